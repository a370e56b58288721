/// How numbers are stored.
public enum DType: UInt8, Sendable, CaseIterable {
  case float32, float16, bfloat16, int8, uint8, int32, int64
  /// e4m3 without infinities.
  case float8

  /// Bytes of one number.
  public var byteCount: Int {
    switch self {
    case .float32, .int32: 4
    case .float16, .bfloat16: 2
    case .int8, .uint8, .float8: 1
    case .int64: 8
    }
  }

  /// The name in `config.json` and in messages.
  public var name: String {
    switch self {
    case .float32: "float32"
    case .float16: "float16"
    case .bfloat16: "bfloat16"
    case .int8: "int8"
    case .uint8: "uint8"
    case .int32: "int32"
    case .int64: "int64"
    case .float8: "float8"
    }
  }
}
