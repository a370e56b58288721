import ApusCommandLine
import ApusCore
import Foundation
import Testing

@Suite struct DoctorTests {
  private func report(_ files: [String: String], openFiles: (soft: Int, hard: Int) = (20_000, 20_000)) -> [String:
    Finding]
  {
    let findings = MachineReport(openFiles: openFiles) { files[$0] }.findings()
    return Dictionary(uniqueKeysWithValues: findings.map { ($0.subject, $0) })
  }

  private let strong = [
    "/proc/cpuinfo": """
    model name\t: AMD EPYC
    physical id\t: 0
    core id\t: 0
    flags\t: fpu avx2 fma avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni

    model name\t: AMD EPYC
    physical id\t: 0
    core id\t: 0
    flags\t: fpu avx2 fma
    """,
    "/proc/self/status": "Cpus_allowed_list:\t0-1,4\n",
    "/proc/meminfo": "MemTotal: 25165824 kB\nMemAvailable: 20971520 kB\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
  ]

  @Test func aStrongMachine() {
    let found = report(strong)
    #expect(found.values.allSatisfy { $0.level == .good })
    #expect(found["vector instructions"]?.text.contains("AVX-512 bf16, AVX-512 VNNI") == true)
    #expect(found["cores"]?.text == "3 usable by this process, 1 physical")
    #expect(found["memory"]?.text == "24.0 GiB, 20.0 GiB available")
  }

  @Test func aWeakMachineIsToldWhatToDo() {
    var files = strong
    files["/proc/cpuinfo"] = "model name : Old\nflags : fpu sse2\n"
    files["/sys/kernel/mm/transparent_hugepage/enabled"] = "always madvise [never]"
    files["/sys/fs/cgroup/cpu.max"] = "150000 100000"
    files["/sys/fs/cgroup/memory.max"] = "536870912"
    files["/sys/devices/system/node/node0/cpulist"] = "0"
    files["/sys/devices/system/node/node1/cpulist"] = "1"
    let found = report(files, openFiles: (256, 256))
    #expect(found["vector instructions"]?.level == .problem)
    #expect(found["memory"]?.level == .problem && found["memory"]?.text.contains("512 MiB") == true)
    #expect(found["huge pages"]?.remedy?.contains("madvise") == true)
    #expect(found["cores"]?.remedy?.contains("--threads 1") == true)
    #expect(found["NUMA"]?.level == .note && found["open files"]?.level == .note)
  }

  @Test func aMachineThatSaysNothingIsSurvived() { #expect(!report([:]).isEmpty) }

  private func directory(_ files: [String: String]) throws -> String {
    let url = FileManager.default.temporaryDirectory.appending(path: "apus-doctor-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    for (name, text) in files { try text.write(to: url.appending(path: name), atomically: true, encoding: .utf8) }
    return url.path
  }

  private func levels(_ files: [String: String], memory: Int? = 1 << 30) throws -> [String: Finding.Level] {
    let findings = CheckpointReport(path: try directory(files), availableMemory: memory).findings()
    return Dictionary(uniqueKeysWithValues: findings.map { ($0.subject, $0.level) })
  }

  @Test func checkpoints() throws {
    let configuration = """
      {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
       "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
      """
    let whole = [
      "config.json": configuration, "model.safetensors": "x", "tokenizer.json": "{}",
      "chat_template.jinja": "{{ messages }}",
    ]
    #expect(try levels(whole) == ["architecture": .good, "weights": .good, "tokenizer": .good])
    #expect(try levels(whole, memory: 0)["weights"] == .problem)
    #expect(
      try levels(["config.json": configuration]) == ["architecture": .good, "weights": .problem, "tokenizer": .problem])
    #expect(try levels(["config.json": "{"])["architecture"] == .problem)
    #expect(try levels([:])["architecture"] == .problem)
    #expect(try levels(whole.merging(["config.json": #"{"architectures": ["X"]}"#]) { $1 })["architecture"] == .problem)
    let sharded = whole.merging([
      "model.safetensors.index.json": #"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#,
      "one.safetensors": "x",
    ]) { $1 }
    #expect(try levels(sharded)["weights"] == .problem)
    #expect(CheckpointReport(path: "/nowhere/at/all", availableMemory: nil).findings().map(\.level) == [.problem])
  }
}
