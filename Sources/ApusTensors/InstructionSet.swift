internal import ApusCore
internal import CKernels
internal import Glibc

/// Levels of instruction sets for which the CPU kernels are compiled, each containing those before it that its
/// architecture has.
///
/// Results at different levels differ in rounding; at one level they are the same on every machine.
public enum InstructionSet: Int, Sendable, CaseIterable, Comparable {
  /// What every processor of the architecture has.
  case portable = 0
  /// AVX2, FMA and F16C.
  case avx2 = 1
  /// AVX-512 F, BW, VL, DQ and CD.
  case avx512 = 2
  /// AVX-512 with the dot products of bfloat16 (BF16) and int8 (VNNI).
  case avx512bf16 = 3
  /// NEON with dot products of int8 (FEAT_DotProd).
  case neonDot = 4
  /// NEON with products of int8 matrices too (FEAT_I8MM).
  case neonI8MM = 5

  /// The name in messages and in the environment variable `APUS_ISA`.
  public var name: String {
    switch self {
    case .portable: "portable"
    case .avx2: "avx2"
    case .avx512: "avx512"
    case .avx512bf16: "avx512-bf16"
    case .neonDot: "neon-dot"
    case .neonI8MM: "neon-i8mm"
    }
  }

  /// The level of a name.
  public init?(name: String) {
    guard let level = Self.allCases.first(where: { $0.name == name }) else { return nil }
    self = level
  }

  public static func < (a: Self, b: Self) -> Bool { a.rawValue < b.rawValue }

  /// Whether this machine can run the level.
  public var isSupported: Bool { apus_isa_supported(apus_isa(UInt32(rawValue))) != 0 }

  /// The highest level that this machine can run.
  public static var best: Self { Self(rawValue: Int(apus_isa_best().rawValue))! }

  /// The levels that this machine can run, lowest first.
  public static var supported: [Self] { allCases.filter(\.isSupported) }

  /// The level that `APUS_ISA` names, and the best one where the variable is absent or empty.
  /// - Throws: `invalidRequest` for an unknown name, `unsupported` for a level that this machine cannot run.
  static func chosen() throws(EngineError) -> Self {
    guard let text = getenv("APUS_ISA"), text.pointee != 0 else { return best }
    let name = String(cString: text)
    guard let level = Self(name: name) else {
      throw EngineError(
        .invalidRequest,
        "APUS_ISA is \"\(name)\"; it must be one of \(allCases.map(\.name).joined(separator: ", ")).")
    }
    return try level.checked()
  }

  /// The level itself.
  /// - Throws: `unsupported` when this machine cannot run it.
  func checked() throws(EngineError) -> Self {
    guard isSupported else {
      throw EngineError(
        .unsupported, "This processor cannot run the \(name) kernels; the best it can run is \(Self.best.name).")
    }
    return self
  }
}
