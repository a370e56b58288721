package import ApusCore
import ApusModels
import ApusTokenization
import Glibc

/// One thing that was looked at.
package struct Finding: Sendable, Equatable {
  /// How it stands.
  package enum Level: String, Sendable { case good, note, problem }
  /// How it stands.
  package var level: Level
  /// What was looked at.
  package var subject: String
  /// What was found.
  package var text: String
  /// The command or change that mends it.
  package var remedy: String?

  /// Makes a finding.
  package init(_ level: Level, _ subject: String, _ text: String, remedy: String? = nil) {
    self.level = level
    self.subject = subject
    self.text = text
    self.remedy = remedy
  }

  /// The finding as JSON.
  package var json: JSONValue {
    .object(
      JSONObject([
        ("level", .string(level.rawValue)), ("subject", .string(subject)), ("text", .string(text)),
        ("remedy", remedy.map { .string($0) } ?? .null),
      ]))
  }
}

/// Looks at this machine. What the kernel says comes in as the texts of its files, so that tests can play other machines.
package struct MachineReport {
  /// Gives the text of a file, or `nil` if there is none.
  package var file: (String) -> String?
  /// Soft and hard limit of open files.
  package var openFiles: (soft: Int, hard: Int)

  /// Looks at the machine that this runs on.
  package init() {
    file = { path in
      guard let bytes = try? readFile(path) else { return nil }
      return String(decoding: bytes, as: UTF8.self)
    }
    var limit = rlimit()
    getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    openFiles = (Int(clamping: limit.rlim_cur), Int(clamping: limit.rlim_max))
  }

  /// Plays another machine.
  package init(openFiles: (soft: Int, hard: Int), file: @escaping (String) -> String?) {
    self.file = file
    self.openFiles = openFiles
  }

  /// Logical processors that this process may use.
  package var usableProcessors: Int {
    guard let list = value(of: "Cpus_allowed_list", in: file("/proc/self/status") ?? "") else {
      return sysconf(Int32(_SC_NPROCESSORS_ONLN))
    }
    return list.split(separator: ",").reduce(0) { sum, range in
      let ends = range.split(separator: "-").compactMap { Int($0) }
      guard let first = ends.first, let last = ends.last else { return sum }
      return sum + max(0, last - first + 1)
    }
  }

  /// Everything found, most basic first.
  package func findings() -> [Finding] {
    processor() + memory() + limits()
  }

  // MARK: Processor

  private func processor() -> [Finding] {
    var findings: [Finding] = []
    let info = file("/proc/cpuinfo") ?? ""
    let name =
      value(of: "model name", in: info) ?? value(of: "CPU part", in: info).map { "ARM part \($0)" } ?? "unknown"
    findings.append(Finding(.good, "processor", name))
    let flags = Set(
      (value(of: "flags", in: info) ?? value(of: "Features", in: info) ?? "").split(separator: " ").map(String.init))
    let levels = [
      ("AVX2 and FMA", flags.isSuperset(of: ["avx2", "fma"])),
      ("AVX-512", flags.isSuperset(of: ["avx512f", "avx512bw", "avx512vl", "avx512dq"])),
      ("AVX-512 bf16", flags.contains("avx512_bf16")), ("AVX-512 VNNI", flags.contains("avx512_vnni")),
      ("AVX VNNI", flags.contains("avx_vnni")), ("AMX", flags.contains("amx_tile")),
      ("NEON", flags.contains("asimd")), ("bf16 (ARM)", flags.contains("bf16")), ("int8 (ARM)", flags.contains("i8mm")),
    ]
    let present = levels.filter(\.1).map(\.0)
    if present.isEmpty {
      findings.append(
        Finding(
          .problem, "vector instructions", "neither AVX2 nor NEON: only the portable kernels run, many times slower",
          remedy: "use a processor from 2013 or later, or let the virtual machine pass the host's processor through"))
    } else if flags.contains("avx2") && !flags.contains("avx512_bf16") {
      findings.append(
        Finding(
          .note, "vector instructions",
          "\(present.joined(separator: ", ")); no AVX-512 bf16, so bf16 models compute more slowly"))
    } else {
      findings.append(Finding(.good, "vector instructions", present.joined(separator: ", ")))
    }
    var text = "\(usableProcessors) usable by this process"
    if let cores = physicalCores(info) { text += ", \(cores) physical" }
    if let quota = processorQuota() {
      text += ", limited to \(fixed(quota, 1)) by a control group"
      let level: Finding.Level = quota < Double(usableProcessors) ? .note : .good
      findings.append(
        Finding(
          level, "cores", text,
          remedy: level == .note ? "raise the container's CPU limit, or pass --threads \(max(1, Int(quota)))" : nil))
    } else {
      findings.append(Finding(.good, "cores", text))
    }
    let nodes = (0..<64).prefix { file("/sys/devices/system/node/node\($0)/cpulist") != nil }.count
    if nodes > 1 {
      findings.append(
        Finding(
          .note, "NUMA", "\(nodes) memory nodes; a model is fastest within one",
          remedy: "numactl --cpunodebind=0 --membind=0 apus serve ..."))
    } else {
      findings.append(Finding(.good, "NUMA", "one memory node"))
    }
    if let governor = file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map(trim), governor == "powersave",
      file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").map(trim) != "intel_pstate"
    {
      findings.append(
        Finding(.note, "clock", "the governor is 'powersave'", remedy: "sudo cpupower frequency-set -g performance"))
    }
    return findings
  }

  /// Distinct (package, core) pairs of /proc/cpuinfo; `nil` where it does not list them.
  private func physicalCores(_ info: String) -> Int? {
    var cores: Set<String> = []
    for block in info.split(separator: "\n\n") {
      guard let core = value(of: "core id", in: String(block)) else { continue }
      cores.insert("\(value(of: "physical id", in: String(block)) ?? "0").\(core)")
    }
    return cores.isEmpty ? nil : cores.count
  }

  private func processorQuota() -> Double? {
    if let words = file("/sys/fs/cgroup/cpu.max")?.split(whereSeparator: \.isWhitespace), words.count == 2,
      let quota = Double(words[0]), let period = Double(words[1]), period > 0
    {
      return quota / period
    }
    if let quota = file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").map(trim).flatMap(Double.init), quota > 0,
      let period = file("/sys/fs/cgroup/cpu/cpu.cfs_period_us").map(trim).flatMap(Double.init), period > 0
    {
      return quota / period
    }
    return nil
  }

  // MARK: Memory

  /// Bytes of memory that a new process may hope for: what is free or can be freed, within the control group's limit.
  package var availableMemory: Int? {
    guard let available = memoryField("MemAvailable") else { return nil }
    guard let limit = memoryLimit() else { return available }
    let used = file("/sys/fs/cgroup/memory.current").map(trim).flatMap(Int.init) ?? 0
    return min(available, max(0, limit - used))
  }

  private func memoryField(_ name: String) -> Int? {
    value(of: name, in: file("/proc/meminfo") ?? "").flatMap { Int($0.prefix { $0.isNumber }) }.map { $0 * 1024 }
  }

  private func memoryLimit() -> Int? {
    (file("/sys/fs/cgroup/memory.max") ?? file("/sys/fs/cgroup/memory/memory.limit_in_bytes")).map(trim)
      .flatMap(Int.init).flatMap { $0 < 1 << 60 ? $0 : nil }
  }

  private func memory() -> [Finding] {
    var findings: [Finding] = []
    let total = memoryField("MemTotal") ?? 0
    let available = availableMemory ?? 0
    var text = "\(byteSize(total)), \(byteSize(available)) available"
    if let limit = memoryLimit(), limit < total { text += ", limited to \(byteSize(limit)) by a control group" }
    if available < 1 << 30 {
      findings.append(
        Finding(.problem, "memory", text, remedy: "stop other programs, or raise the container's memory limit"))
    } else {
      findings.append(Finding(.good, "memory", text))
    }
    let setting = file("/sys/kernel/mm/transparent_hugepage/enabled") ?? ""
    let mode = setting.split(separator: "[").dropFirst().first?.split(separator: "]").first.map(String.init)
    switch mode {
    case "always", "madvise": findings.append(Finding(.good, "huge pages", "transparent huge pages: \(mode!)"))
    case .some(let mode):
      findings.append(
        Finding(
          .note, "huge pages", "transparent huge pages: \(mode); weights on 4 KiB pages are read more slowly",
          remedy: "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"))
    case nil: findings.append(Finding(.note, "huge pages", "this kernel has no transparent huge pages"))
    }
    return findings
  }

  // MARK: Limits

  private func limits() -> [Finding] {
    var findings: [Finding] = []
    if openFiles.soft < 4096 {
      findings.append(
        Finding(
          .note, "open files",
          "\(grouped(openFiles.soft)): about \(grouped(max(0, openFiles.soft - 64))) clients at once",
          remedy: openFiles.hard >= 65536
            ? "ulimit -n 65536" : "echo '* - nofile 65536' | sudo tee -a /etc/security/limits.conf"))
    } else {
      findings.append(Finding(.good, "open files", openFiles.soft > 1 << 40 ? "unlimited" : grouped(openFiles.soft)))
    }
    if let kernel = file("/proc/sys/kernel/osrelease").map(trim) {
      findings.append(Finding(.good, "kernel", "Linux \(kernel)"))
    }
    return findings
  }

  /// The text after a name and a colon, of the first line that begins with the name.
  private func value(of name: String, in text: String) -> String? {
    for line in text.split(separator: "\n") where line.hasPrefix(name) {
      let rest = line.dropFirst(name.count).drop { $0 == " " || $0 == "\t" }
      if rest.hasPrefix(":") { return trim(String(rest.dropFirst())) }
    }
    return nil
  }
}

/// Looks at a checkpoint directory without loading it.
package struct CheckpointReport {
  /// The directory.
  package var path: String
  /// Bytes of memory at hand, to compare the weights with.
  package var availableMemory: Int?

  /// Prepares to look at a directory.
  package init(path: String, availableMemory: Int?) {
    self.path = path
    self.availableMemory = availableMemory
  }

  /// Everything found.
  package func findings() -> [Finding] {
    guard fileExists(path) else {
      return [
        Finding(
          .problem, "model", "there is no '\(path)'", remedy: "name a directory with config.json and *.safetensors")
      ]
    }
    var findings: [Finding] = []
    do throws(EngineError) {
      let configuration = try ModelConfiguration(directory: path)
      let millions = Double(configuration.parameterCount) / 1e6
      let size = millions >= 1000 ? "\(fixed(millions / 1000, 1)) billion" : "\(fixed(millions, 1)) million"
      findings.append(
        Finding(
          .good, "architecture",
          "\(configuration.architecture), \(size) parameters, context \(grouped(configuration.maximumContextLength))"))
    } catch {
      let remedy =
        error.code == .unsupported
        ? "choose a checkpoint of an architecture and format that are implemented (--quantization int8 shrinks it)"
        : "download the whole repository again, as in: git clone https://huggingface.co/OWNER/NAME"
      findings.append(Finding(.problem, "architecture", error.message, remedy: remedy))
    }
    findings += weights()
    if let problem = tokenizer() { findings.append(problem) }
    return findings
  }

  private func document(_ name: String) -> JSONValue? {
    (try? readFile("\(path)/\(name)")).flatMap { try? JSONValue.parse($0) }
  }

  private func size(_ name: String) -> Int? {
    var status = stat()
    return stat("\(path)/\(name)", &status) == 0 ? Int(status.st_size) : nil
  }

  private func weights() -> [Finding] {
    var names = ["model.safetensors"]
    if let index = document("model.safetensors.index.json") {
      names = Array(Set((index["weight_map"]?.objectValue ?? JSONObject()).compactMap(\.value.stringValue))).sorted()
    }
    let missing = names.filter { size($0) == nil }
    guard missing.isEmpty else {
      return [
        Finding(
          .problem, "weights",
          missing.count == 1
            ? "\(missing[0]) is missing"
            : "\(missing.count) of \(names.count) files are missing, such as \(missing[0])",
          remedy: "download the missing files, or pass --load-format dummy for random weights")
      ]
    }
    let bytes = names.reduce(0) { $0 + (size($1) ?? 0) }
    var text = "\(byteSize(bytes)) in \(names.count) file\(names.count == 1 ? "" : "s")"
    guard let availableMemory else { return [Finding(.good, "weights", text)] }
    if bytes > availableMemory {
      text += ", more than the \(byteSize(availableMemory)) of memory at hand"
      return [Finding(.problem, "weights", text, remedy: "pass --quantization int8, or use a machine with more memory")]
    }
    return [Finding(.good, "weights", text)]
  }

  private func tokenizer() -> Finding? {
    let names = ["tokenizer.json", "tokenizer.model", "vocab.json"]
    guard let name = names.first(where: { size($0) != nil }) else {
      return Finding(
        .problem, "tokenizer", "none of \(names.joined(separator: ", ")) is there",
        remedy: "download the tokenizer files, or pass --tokenizer-path")
    }
    let hasTemplate: Bool
    do throws(EngineError) {
      hasTemplate = try !ChatTemplateSet.load(directory: path).isEmpty
    } catch {
      return Finding(
        .problem, "tokenizer", "\(name), but the chat template cannot be read: \(error.message)",
        remedy: "pass --chat-template")
    }
    return hasTemplate
      ? Finding(.good, "tokenizer", "\(name), with a chat template")
      : Finding(
        .note, "tokenizer", "\(name), without a chat template: chats are refused",
        remedy: "pass --chat-template, or use completions")
  }
}
