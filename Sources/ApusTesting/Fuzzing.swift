import Glibc

/// Random numbers with a seed (SplitMix64: Steele, Lea, Flood 2014) and random changes to inputs of parsers.
package struct FuzzGenerator: RandomNumberGenerator {
  private var state: UInt64

  package init(seed: UInt64) { state = seed }

  package mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }

  /// A number from zero up to, and without, a limit above zero.
  package mutating func below(_ limit: Int) -> Int { Int(next() % UInt64(limit)) }

  package mutating func pick<T>(_ choices: [T]) -> T { choices[below(choices.count)] }

  /// Changes an input in one to five places: bytes set, put in, taken out, repeated and moved, numbers made absurd, the end
  /// cut off, words of the format's own put in.
  package mutating func mutated(_ input: [UInt8], words: [String] = []) -> [UInt8] {
    var bytes = input
    for _ in 0...below(5) {
      guard !bytes.isEmpty else {
        bytes = [UInt8(truncatingIfNeeded: next())]
        continue
      }
      let place = below(bytes.count)
      switch below(9) {
      case 0: bytes[place] = UInt8(truncatingIfNeeded: next())
      case 1: bytes[place] = pick([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5C, 0x7B, 0x5B, 0x5D, 0x2C, 0x0A, 0x20])
      case 2: bytes[place] ^= 1 << UInt8(below(8))
      case 3: if below(3) == 0 { bytes.removeLast(bytes.count - place) }
      case 4: bytes.removeSubrange(place..<min(bytes.count, place + 1 + below(16)))
      case 5: bytes.insert(contentsOf: bytes[place..<min(bytes.count, place + 1 + below(64))], at: below(bytes.count))
      case 6:
        // Eight bytes as a length, in either order.
        let length: [UInt8] = pick([[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], [0, 0, 0, 0, 1, 0, 0, 0]])
        for (index, byte) in length.enumerated() where place + index < bytes.count { bytes[place + index] = byte }
      case 7:
        // A number in a text.
        if let start = bytes[place...].firstIndex(where: { (0x30...0x39).contains($0) }) {
          var end = start
          while end < bytes.count, (0x30...0x39).contains(bytes[end]) { end += 1 }
          let number = pick(["0", "-1", "1", "2147483647", "4294967296", "9223372036854775807", "1e999", "0.5", "null"])
          bytes.replaceSubrange(start..<end, with: number.utf8)
        }
      default:
        if words.isEmpty {
          bytes.insert(UInt8(truncatingIfNeeded: next()), at: place)
        } else {
          bytes.insert(contentsOf: pick(words).utf8, at: place)
        }
      }
    }
    return bytes
  }
}

/// How a run of random inputs went.
package struct FuzzReport: CustomStringConvertible {
  /// Inputs tried.
  package var count = 0
  /// The longest that one of them took.
  package var slowestSeconds = 0.0
  /// What repeats the slowest one.
  package var slowestCase: UInt64 = 0
  /// By how much the memory of the process, at its highest, grew meanwhile.
  package var grownBytes = 0
  /// Whether the process does nothing else, so that its memory is this run's.
  package var isAlone = false

  package var description: String {
    "\(count) inputs, the slowest (APUS_FUZZ_SEED=\(slowestCase) APUS_FUZZ_COUNT=1) took \(slowestSeconds) s, memory grew "
      + "by \(grownBytes >> 20) MiB"
  }

  /// Whether no input took longer than a second (ten where other tests run beside) or memory beyond bounds.
  package var isBounded: Bool { slowestSeconds < (isAlone ? 2 : 10) && (!isAlone || grownBytes < 768 << 20) }
}

/// Runs a body over random inputs: a moment in ordinary tests, `APUS_FUZZ_SECONDS` where that is set.
///
/// `APUS_FUZZ_SEED` sets the seed, else it is fixed, or the clock's in long runs. Every input has a seed of its own; where
/// `APUS_FUZZ_CASE_FILE` names a file, the one at work stands in it, so that an input that ends the process can be
/// repeated with `APUS_FUZZ_SEED=... APUS_FUZZ_COUNT=1`.
package func fuzz(
  _ name: String, minimumCount: Int = 50, _ body: (inout FuzzGenerator) throws -> Void
) rethrows -> FuzzReport {
  func variable(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }
  func now() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
  }
  func peakBytes() -> Int {
    var usage = rusage()
    getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
    return usage.ru_maxrss * 1024
  }
  let seconds = variable("APUS_FUZZ_SECONDS").flatMap { Double($0) }
  let limit = variable("APUS_FUZZ_COUNT").flatMap { Int($0) }
  let given = variable("APUS_FUZZ_SEED").flatMap { UInt64($0) }
  var seeds = FuzzGenerator(seed: given ?? (seconds == nil ? 20_26 : UInt64(now() * 1e6)))
  let file = variable("APUS_FUZZ_CASE_FILE").map { open($0, O_WRONLY | O_CREAT | O_CLOEXEC, 0o644) } ?? -1
  defer { if file >= 0 { close(file) } }
  var report = FuzzReport()
  report.isAlone = seconds != nil
  let memory = peakBytes()
  let start = now()
  while limit.map({ report.count < $0 })
    ?? (report.count < minimumCount || now() - start < seconds ?? 0.2)
  {
    let seed = report.count == 0 && limit == 1 ? given ?? seeds.next() : seeds.next()
    if file >= 0 {
      let line = "\(name) \(seed)                    \n"
      _ = line.withCString { pwrite(file, $0, line.utf8.count, 0) }
    }
    var generator = FuzzGenerator(seed: seed)
    let before = now()
    try body(&generator)
    let taken = now() - before
    if taken > report.slowestSeconds { (report.slowestSeconds, report.slowestCase) = (taken, seed) }
    report.count += 1
  }
  report.grownBytes = peakBytes() - memory
  if seconds != nil { print("\(name): \(report)") }
  return report
}
