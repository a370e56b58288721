public import ApusModels
public import ApusTensors

/// What a conversion writes.
public enum ConversionFormat: Sendable, Equatable {
  /// A Hugging Face directory of plain numbers: float32, float16 or bfloat16.
  case dense(DType)
  /// A Hugging Face directory whose linear layers are int8 with a scale for each output (compressed-tensors W8A8).
  case int8
  /// A Hugging Face directory whose linear layers are 4-bit integers in groups (W4A16).
  case int4
  /// A GGUF file whose matrices have the type.
  case gguf(GGUFWeightType)

  /// All formats by the names that the command line has for them.
  public static let named: [(name: String, format: ConversionFormat)] =
    [
      ("fp32", .dense(.float32)), ("fp16", .dense(.float16)), ("bf16", .dense(.bfloat16)), ("int8", .int8),
      ("int4", .int4),
    ]
    + GGUFWeightType.writable.map { ("gguf-\($0.name.lowercased())", .gguf($0)) }

  /// The format of a name; `nil` if there is none.
  public init?(name: String) {
    guard let match = Self.named.first(where: { $0.name == name.lowercased() }) else { return nil }
    self = match.format
  }

  /// The name on the command line.
  public var name: String { Self.named.first { $0.format == self }?.name ?? "" }
}

/// How int4 weights are laid out in the file.
public enum IntegerLayout: String, Sendable, CaseIterable {
  /// `pack-quantized` of compressed-tensors: words pack inputs.
  case compressedTensors = "compressed-tensors"
  /// AutoGPTQ's layout without act-order. The numbers are rounded to nearest all the same: GPTQ's calibration is not run.
  case gptq
  /// AutoAWQ's layout for the GEMM kernel. AWQ's calibration is not run either.
  case awq
}

/// What to convert and how.
public struct ConversionOptions: Sendable {
  /// A checkpoint directory or a GGUF file.
  public var input: String
  /// The directory or, for GGUF, the file to write.
  public var output: String
  public var format: ConversionFormat
  /// int4: inputs that share a scale.
  public var groupSize = 128
  /// int4: whether zero is the middle of the range, so that no zero points are stored.
  public var isSymmetric = true
  public var layout = IntegerLayout.compressedTensors
  /// Names of tensors or modules that are not quantised; `*` stands for any text.
  public var kept: [String] = []
  /// GGUF: whether the embedding table is quantised, too.
  public var quantizesEmbeddings = false
  /// Whether the output layer is quantised, too.
  public var quantizesOutput = false
  /// The number format of what a quantising format leaves dense; `nil` keeps each tensor's own.
  public var denseType: DType?
  /// The most bytes of a safetensors file; a single tensor may be larger.
  public var maxShardBytes = 5_000_000_000
  /// Whether an output that exists is replaced.
  public var overwrites = false
  /// Bytes that the disk is taken to have free; `nil` asks it.
  package var freeBytes: Int?

  /// Options with defaults.
  public init(input: String, output: String, format: ConversionFormat) {
    self.input = input
    self.output = output
    self.format = format
  }
}
