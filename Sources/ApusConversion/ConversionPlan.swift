import ApusCore
import ApusModels
import ApusTensors
import ApusTokenization

/// What is done to a tensor.
enum ConversionAction {
  /// Its bytes go over as they are.
  case copy
  /// Its rows become rows of the type.
  case rows(GGUFWeightType)
  /// It becomes int8 numbers and a scale for each output.
  case int8
  /// It becomes 4-bit numbers in groups.
  case int4
  /// It has no source.
  case bytes([UInt8])
}

/// One tensor of the source and what it becomes.
struct ConversionStep {
  var tensor: SourceTensor
  var action: ConversionAction
  /// What is written, the weights first.
  var outputs: [OutputTensor]
  var writtenAs: String
  /// Rows of a head to be interleaved for GGUF's `llama`; 0 for none.
  var interleavedHead = 0
}

/// All that a conversion will write.
struct ConversionPlan {
  var source: any ConversionSource
  var steps: [ConversionStep]
  var layout: OutputLayout
  /// Small files of the output by name, and files that are copied.
  var files: [(name: String, bytes: [UInt8])] = []
  var copies: [(name: String, path: String)] = []
  var notes: [String] = []
  var isDirectory: Bool
}

/// Which tensors a quantising format leaves alone.
struct TensorSelection {
  let options: ConversionOptions

  /// Whether a name is of the form of one of the patterns that keep tensors.
  func isKept(_ name: String) -> Bool {
    let module = name.hasSuffix(".weight") ? String(name.dropLast(7)) : name
    return options.kept.contains { pattern in
      Wildcard.matches(pattern, name) || Wildcard.matches(pattern, module)
    }
  }

  private static let embeddings: Set<String> = [
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "embed_positions",
    "embed_in", "tok_embeddings", "token_embd",
  ]
  private static let outputs: Set<String> = ["lm_head", "embed_out", "output", "score", "classifier", "v_head"]
  private static let routers: Set<String> = [
    "gate", "router", "shared_expert_gate", "wg", "ffn_gate_inp", "ffn_gate_inp_shexp",
  ]
  private static let otherTowers: Set<String> = [
    "visual", "vision_tower", "vision_model", "vision_encoder", "multi_modal_projector", "mm_projector", "audio_tower",
    "audio_encoder", "embed_vision",
  ]

  /// What a tensor is, as far as quantisation goes.
  enum Role { case linear, embedding, output, other }

  /// The role by name and shape. Norms, routers of experts and towers for pictures and sound are `other`.
  func role(_ name: String, _ shape: [Int]) -> Role {
    let parts = name.split(separator: ".").map(String.init)
    guard shape.count >= 2, parts.last == "weight", parts.count >= 2 else { return .other }
    let module = parts[parts.count - 2]
    if parts.contains(where: { Self.otherTowers.contains($0) }) { return .other }
    if Self.embeddings.contains(module) { return .embedding }
    if Self.outputs.contains(module), !parts.contains("layers"), !parts.contains("h") { return .output }
    if Self.routers.contains(module) || module.contains("norm") || module.hasPrefix("ln_") { return .other }
    return .linear
  }

  /// Whether a quantising format rounds the tensor.
  func isQuantized(_ name: String, _ shape: [Int]) -> Bool {
    if isKept(name) { return false }
    return switch role(name, shape) {
    case .linear: true
    case .embedding: options.quantizesEmbeddings
    case .output: options.quantizesOutput
    case .other: false
    }
  }

  /// Numbers that models compute with in float32 whatever the rest is: a cast leaves them as they are.
  static func staysAsStored(_ name: String) -> Bool {
    ["inv_freq", "e_score_correction_bias", "A_log"].contains { name.hasSuffix($0) }
  }

  /// The type of a tensor that is not quantised.
  func denseType(_ tensor: SourceTensor) -> GGUFWeightType {
    if let type = options.denseType { return type.weightType }
    return tensor.isQuantized ? .bf16 : tensor.type ?? .f32
  }
}

extension SourceTensor {
  /// An output of rows of a type, under a name.
  func output(_ name: String, _ type: GGUFWeightType, isGGUF: Bool) -> OutputTensor {
    OutputTensor(
      name: name, typeName: isGGUF ? type.name : type.safetensorsName, shape: shape,
      byteCount: count / type.blockLength * type.blockBytes, typeID: type.rawValue)
  }
}

// MARK: Hugging Face directories

extension ConversionPlan {
  /// A directory of safetensors files.
  init(
    directory options: ConversionOptions, source: any ConversionSource, config: JSONObject, sourceDType: DType?
  ) throws(EngineError) {
    let selection = TensorSelection(options: options)
    var steps: [ConversionStep] = []
    var ignored: [String] = []
    var notes: [String] = []
    var quantizedCount = 0
    // Scales are of the type that the model's other numbers have.
    let scaleType: DType =
      options.layout == .compressedTensors ? options.denseType ?? sourceDType ?? .bfloat16 : .float16
    for tensor in source.tensors {
      let module = tensor.name.hasSuffix(".weight") ? String(tensor.name.dropLast(7)) : tensor.name
      guard let own = tensor.type else {
        guard let (bytes, _) = source.bytes(tensor) else { continue }
        steps.append(
          ConversionStep(
            tensor: tensor, action: .copy,
            outputs: [
              OutputTensor(
                name: tensor.name, typeName: tensor.storedAs, shape: tensor.shape, byteCount: bytes.count)
            ],
            writtenAs: tensor.storedAs))
        continue
      }
      switch options.format {
      case .dense(let dtype):
        let stays = !tensor.isQuantized && (selection.isKept(tensor.name) || TensorSelection.staysAsStored(tensor.name))
        let type = stays ? own : dtype.weightType
        steps.append(Self.dense(tensor, type, source))
      case .int8, .int4:
        let isLinear = tensor.shape.count == 2 && selection.isQuantized(tensor.name, tensor.shape)
        var isQuantized = isLinear && selection.role(tensor.name, tensor.shape) != .embedding
        if isQuantized, case .int4 = options.format {
          let fits = try Self.fits(tensor, options, path: source.path)
          if !fits {
            notes.append(
              "\(tensor.name) stays dense: its \(tensor.columns) inputs are not a multiple of the group size, "
                + "\(options.groupSize).")
          }
          isQuantized = fits
        }
        if isQuantized {
          quantizedCount += 1
          steps.append(Self.integers(tensor, module, options, scaleType))
        } else {
          steps.append(Self.dense(tensor, selection.denseType(tensor), source))
          if tensor.shape.count == 2, tensor.name.hasSuffix(".weight"),
            selection.role(tensor.name, tensor.shape) != .embedding
          {
            ignored.append(module)
          }
        }
      case .gguf: break
      }
    }
    var config = config
    for key in ["quantization_config", "compression_config"] { config[key] = nil }
    var dtypeName = sourceDType?.name
    if case .dense(let dtype) = options.format {
      dtypeName = dtype.name
    } else if let type = options.denseType {
      dtypeName = type.name
    }
    if let dtypeName { Self.setDType(&config, dtypeName) }
    if options.format == .int8 || options.format == .int4 {
      guard quantizedCount > 0 else {
        throw EngineError(
          .unsupported,
          "\(source.path) has no matrix that \(options.format.name) could be applied to"
            + (options.format == .int4
              ? " with groups of \(options.groupSize) inputs; choose another --group-size." : "."))
      }
      if !ignored.contains("lm_head"), !options.quantizesOutput { ignored.append("lm_head") }
      config["quantization_config"] = .object(Self.quantizationConfig(options, ignored: ignored.sorted()))
      if options.layout == .gptq, ignored.contains(where: { $0 != "lm_head" }) {
        notes.append(
          "Other programs may not know that some matrices are dense: GPTQ's configuration has no common field for it.")
      }
    }
    self.source = source
    self.steps = steps
    self.notes = notes
    layout = OutputLayout(safetensors: steps.flatMap(\.outputs), limit: options.maxShardBytes)
    var writer = PrettyJSON()
    writer.write(.object(config))
    files = [("config.json", writer.bytes)]
    if let index = layout.index { files.append(("model.safetensors.index.json", index)) }
    isDirectory = true
  }

  private static func dense(
    _ tensor: SourceTensor, _ type: GGUFWeightType, _ source: any ConversionSource
  ) -> ConversionStep {
    let isSame = !tensor.isQuantized && tensor.type == type && source.bytes(tensor) != nil
    return ConversionStep(
      tensor: tensor, action: isSame ? .copy : .rows(type), outputs: [tensor.output(tensor.name, type, isGGUF: false)],
      writtenAs: type.safetensorsName)
  }

  /// Whether a matrix can be cut into groups and packed.
  private static func fits(
    _ tensor: SourceTensor, _ options: ConversionOptions, path: String
  ) throws(EngineError) -> Bool {
    let fits = tensor.columns % options.groupSize == 0
    if options.layout == .compressedTensors { return fits }
    guard fits, tensor.columns % 8 == 0, tensor.rows % 8 == 0 else {
      throw EngineError(
        .unsupported,
        "\(path): tensor \(tensor.name) of shape \(tensor.shape) does not fit the layout \(options.layout.rawValue): its "
          + "inputs must be a multiple of the group size (\(options.groupSize)) and its outputs of 8; choose another "
          + "--group-size, keep it with --keep, or take the layout compressed-tensors.")
    }
    return true
  }

  private static func integers(
    _ tensor: SourceTensor, _ module: String, _ options: ConversionOptions, _ scaleType: DType
  ) -> ConversionStep {
    let (outputs, inputs) = (tensor.rows, tensor.columns)
    func make(_ suffix: String, _ type: String, _ shape: [Int], _ width: Int) -> OutputTensor {
      OutputTensor(
        name: "\(module).\(suffix)", typeName: type, shape: shape, byteCount: shape.reduce(1, *) * width)
    }
    if options.format == .int8 {
      return ConversionStep(
        tensor: tensor, action: .int8,
        outputs: [make("weight", "I8", tensor.shape, 1), make("weight_scale", "F32", [outputs, 1], 4)],
        writtenAs: "int8")
    }
    let groups = inputs / options.groupSize
    let (scaleName, width) = (scaleType.weightType.safetensorsName, scaleType.byteCount)
    var result: [OutputTensor]
    switch options.layout {
    case .compressedTensors:
      result = [
        make("weight_packed", "I32", [outputs, (inputs + 7) / 8], 4),
        make("weight_scale", scaleName, [outputs, groups], width), make("weight_shape", "I64", [2], 8),
      ]
      if !options.isSymmetric { result.append(make("weight_zero_point", "I32", [(outputs + 7) / 8, groups], 4)) }
    case .gptq:
      result = [
        make("qweight", "I32", [inputs / 8, outputs], 4), make("qzeros", "I32", [groups, outputs / 8], 4),
        make("scales", "F16", [groups, outputs], 2), make("g_idx", "I32", [inputs], 4),
      ]
    case .awq:
      result = [
        make("qweight", "I32", [inputs, outputs / 8], 4), make("qzeros", "I32", [groups, outputs / 8], 4),
        make("scales", "F16", [groups, outputs], 2),
      ]
    }
    return ConversionStep(tensor: tensor, action: .int4, outputs: result, writtenAs: "int4")
  }

  /// Names the number format where the file does, newer or older spelling; in a nested text model as well.
  private static func setDType(_ config: inout JSONObject, _ name: String) {
    config[config["dtype"] != nil ? "dtype" : "torch_dtype"] = .string(name)
    if var text = config["text_config"]?.objectValue {
      for key in ["dtype", "torch_dtype"] where text[key] != nil { text[key] = .string(name) }
      config["text_config"] = .object(text)
    }
  }

  private static func quantizationConfig(_ options: ConversionOptions, ignored: [String]) -> JSONObject {
    let ignore = JSONValue.array(ignored.map { .string($0) })
    func arguments(bits: Int64, strategy: String, groupSize: Int?, isSymmetric: Bool, isDynamic: Bool) -> JSONValue {
      .object(
        JSONObject([
          ("num_bits", .int(bits)), ("type", "int"), ("symmetric", .bool(isSymmetric)), ("strategy", .string(strategy)),
          ("group_size", groupSize.map { .int(Int64($0)) } ?? .null), ("block_structure", .null),
          ("dynamic", .bool(isDynamic)), ("actorder", .null), ("observer", isDynamic ? .null : "minmax"),
          ("observer_kwargs", .object(JSONObject())),
        ]))
    }
    if options.format == .int4, options.layout != .compressedTensors {
      var config = JSONObject([
        ("quant_method", .string(options.layout.rawValue)), ("bits", 4), ("group_size", .int(Int64(options.groupSize))),
      ])
      if options.layout == .gptq {
        config["desc_act"] = false
        config["sym"] = .bool(options.isSymmetric)
        config["checkpoint_format"] = "gptq"
        config["true_sequential"] = true
        config["lm_head"] = .bool(options.quantizesOutput)
      } else {
        config["zero_point"] = true
        config["version"] = "gemm"
      }
      config["modules_to_not_convert"] = ignore
      return config
    }
    let isInt8 = options.format == .int8
    let weights =
      isInt8
      ? arguments(bits: 8, strategy: "channel", groupSize: nil, isSymmetric: true, isDynamic: false)
      : arguments(
        bits: 4, strategy: "group", groupSize: options.groupSize, isSymmetric: options.isSymmetric, isDynamic: false)
    let inputs =
      isInt8 ? arguments(bits: 8, strategy: "token", groupSize: nil, isSymmetric: true, isDynamic: true) : .null
    return JSONObject([
      ("quant_method", "compressed-tensors"), ("format", isInt8 ? "int-quantized" : "pack-quantized"),
      ("quantization_status", "compressed"),
      (
        "config_groups",
        [
          "group_0": [
            "targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": .null,
          ]
        ]
      ), ("ignore", ignore), ("kv_cache_scheme", .null), ("global_compression_ratio", .null),
    ])
  }

  /// Files of a checkpoint directory that go over as they are: all small ones that do not hold or describe weights.
  static func companions(of directory: String) -> [(name: String, path: String)] {
    let weightEndings = [
      ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".partial", ".md",
    ]
    let described: Set<String> = ["config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"]
    var result: [(name: String, path: String)] = []
    for name in fileNames(in: directory) where !name.hasPrefix(".") && !described.contains(name) {
      let path = "\(directory)/\(name)"
      if name == templateFolder, fileKind(path) == .directory {
        for file in fileNames(in: path) where file.hasSuffix(".jinja") {
          result.append(("\(name)/\(file)", "\(path)/\(file)"))
        }
      } else if fileKind(path) == .file, !weightEndings.contains(where: { name.hasSuffix($0) }) {
        result.append((name, path))
      }
    }
    return result
  }
}

/// Writes JSON with line breaks, as configuration files have it.
struct PrettyJSON {
  var bytes: [UInt8] = []

  mutating func write(_ value: JSONValue) {
    write(value, indent: 0)
    bytes.append(0x0A)
  }

  private mutating func line(_ indent: Int) {
    bytes.append(0x0A)
    bytes.append(contentsOf: [UInt8](repeating: 0x20, count: 2 * indent))
  }

  private mutating func write(_ value: JSONValue, indent: Int) {
    switch value {
    case .object(let object) where !object.isEmpty:
      bytes.append(UInt8(ascii: "{"))
      for (index, entry) in object.enumerated() {
        if index > 0 { bytes.append(UInt8(ascii: ",")) }
        line(indent + 1)
        bytes.append(contentsOf: JSONValue.string(entry.key).compactText.utf8)
        bytes.append(contentsOf: ": ".utf8)
        write(entry.value, indent: indent + 1)
      }
      line(indent)
      bytes.append(UInt8(ascii: "}"))
    case .array(let elements) where !elements.isEmpty:
      bytes.append(UInt8(ascii: "["))
      for (index, element) in elements.enumerated() {
        if index > 0 { bytes.append(UInt8(ascii: ",")) }
        line(indent + 1)
        write(element, indent: indent + 1)
      }
      line(indent)
      bytes.append(UInt8(ascii: "]"))
    default: bytes.append(contentsOf: value.compactText.utf8)
    }
  }
}

// MARK: GGUF files

extension ConversionPlan {
  /// The type of a matrix in a GGUF file: the one asked for, or what its rows allow.
  private static func blockType(
    _ type: GGUFWeightType, columns: Int, dense: GGUFWeightType
  ) -> GGUFWeightType {
    if columns % type.blockLength == 0 { return type }
    // The nearest type of smaller blocks, as llama.cpp chooses.
    let smaller: GGUFWeightType =
      switch type {
      case .q4_K: .q5_0
      case .q5_K: .q5_1
      default: .q8_0
      }
    return type.blockLength > 32 && columns % 32 == 0 ? smaller : dense
  }

  /// `general.file_type` by the type of most tensors.
  private static let fileTypes: [GGUFWeightType: Int] = [
    .f32: 0, .f16: 1, .q4_0: 2, .q4_1: 3, .q8_0: 7, .q5_0: 8, .q5_1: 9, .q4_K: 14, .q5_K: 16, .q6_K: 18, .bf16: 32,
  ]

  private static func rows(
    _ tensor: SourceTensor, _ name: String, asked: GGUFWeightType, _ options: ConversionOptions,
    _ source: any ConversionSource, interleavedHead: Int = 0, notes: inout [String]
  ) -> ConversionStep {
    let selection = TensorSelection(options: options)
    var type: GGUFWeightType
    if tensor.shape.count < 2 {
      // Norms and biases are float32 in every GGUF file.
      type = .f32
    } else if asked.dtype != nil {
      type = selection.isKept(tensor.name) || selection.isKept(name) ? selection.denseType(tensor) : asked
    } else if selection.isQuantized(tensor.name, tensor.shape), selection.isQuantized(name, tensor.shape) {
      type = blockType(asked, columns: tensor.columns, dense: selection.denseType(tensor))
      if type != asked {
        notes.append(
          "\(tensor.name) becomes \(type.name): its rows of \(tensor.columns) numbers are not a multiple of "
            + "\(asked.blockLength), the block length of \(asked.name).")
      }
    } else {
      type = selection.denseType(tensor)
    }
    // What stays as it is in a GGUF file keeps its blocks.
    let staysQuantized =
      source is GGUFTensorSource && tensor.isQuantized && options.denseType == nil
      && tensor.shape.count >= 2 && type == .bf16 && asked.dtype == nil
    if staysQuantized, let own = tensor.type { type = own }
    let isSame =
      interleavedHead == 0 && tensor.type == type && source.bytes(tensor) != nil
      && (!tensor.isQuantized || source is GGUFTensorSource)
    return ConversionStep(
      tensor: tensor, action: isSame ? .copy : .rows(type), outputs: [tensor.output(name, type, isGGUF: true)],
      writtenAs: type.name, interleavedHead: interleavedHead)
  }

  /// A GGUF file of a Hugging Face directory.
  init(gguf type: GGUFWeightType, _ options: ConversionOptions, source: DirectorySource) throws(EngineError) {
    guard let configuration = source.configuration else { throw source.configurationError! }
    func refuse(_ sentence: String) -> EngineError { EngineError(.unsupported, "\(source.path): \(sentence).") }
    var metadata = GGUFMetadataWriter()
    let (architecture, divisors) = try configuration.write(to: &metadata, path: source.path)
    let folder = source.path.split(separator: "/").last.map(String.init) ?? source.path
    let named = source.config["_name_or_path"]?.stringValue?.split(separator: "/").last.map(String.init)
    metadata.set("general.name", text: named ?? folder)
    metadata.set("general.file_type", size: Self.fileTypes[type] ?? 0)
    metadata.set("general.quantization_version", size: 2)
    let generation = try GenerationConfiguration(
      directory: source.path, vocabularySize: configuration.vocabularySize)
    let tokenizer = try TokenizerMetadata(
      directory: source.path, vocabularySize: configuration.vocabularySize,
      ends: generation.eosTokenIDs.isEmpty ? configuration.eosTokenIDs : generation.eosTokenIDs)
    tokenizer.write(to: &metadata)
    var notes = tokenizer.notes
    if configuration.slidingWindows.contains(where: { $0 > 0 && $0 < configuration.maxPositionEmbeddings }) {
      notes.append("llama.cpp does not apply the sliding window of this model; Apus does.")
    }

    var steps: [ConversionStep] = []
    guard var expected = configuration.weightShapes else {
      throw refuse("the class \(configuration.architecture) cannot become a GGUF file yet")
    }
    let hasTable = source.tensors.contains { $0.name == "model.embed_tokens.weight" }
    for tensor in source.tensors {
      var name = tensor.name
      if name.hasSuffix(".rotary_emb.inv_freq") || name.hasSuffix(".masked_bias") { continue }
      // A tied matrix may be stored under either of its names, or under both.
      if configuration.tiedEmbeddings, name == "lm_head.weight" {
        if hasTable { continue }
        name = "model.embed_tokens.weight"
      }
      guard let own = GGUFNames.name(of: name), let shape = expected.removeValue(forKey: name) else {
        if name.hasSuffix(".bias"), try Self.isZero(tensor, source) { continue }
        throw refuse("tensor \(name) has no place in GGUF's \(architecture)")
      }
      guard tensor.shape == shape, tensor.type != nil else {
        throw EngineError(
          .invalidCheckpoint,
          "\(source.path): tensor \(tensor.name) of type \(tensor.storedAs) has shape \(tensor.shape), but config.json "
            + "asks for \(shape).")
      }
      var head = 0
      if architecture == "llama" {
        if name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.") {
          head = configuration.headDimension
        }
      }
      steps.append(Self.rows(tensor, own, asked: type, options, source, interleavedHead: head, notes: &notes))
    }
    if let missing = expected.keys.sorted().first {
      throw EngineError(
        .invalidCheckpoint,
        "\(source.path): tensor \(missing) is missing; expected one of shape \(expected[missing]!).")
    }
    // Embeddings first and layers in order, as files usually have it.
    steps.sort { Self.order($0.outputs[0].name) < Self.order($1.outputs[0].name) }
    if let divisors {
      let tensor = SourceTensor(name: "rope_freqs.weight", shape: [divisors.count], storedAs: "config.json", type: .f32)
      let bytes = divisors.flatMap { number in withUnsafeBytes(of: number.bitPattern.littleEndian) { Array($0) } }
      steps.insert(
        ConversionStep(
          tensor: tensor, action: .bytes(bytes), outputs: [tensor.output(tensor.name, .f32, isGGUF: true)],
          writtenAs: "F32"), at: 0)
    }
    self.source = source
    self.steps = steps
    self.notes = notes
    layout = OutputLayout(gguf: steps.flatMap(\.outputs), metadata: metadata, alignment: 32)
    isDirectory = false
  }

  /// A place in the list of tensors.
  private static func order(_ name: String) -> (Int, Int, String) {
    let parts = name.split(separator: ".")
    if parts.first == "blk", parts.count > 2, let layer = Int(parts[1]) { return (1, layer, name) }
    return (name == "token_embd.weight" ? 0 : 2, 0, name)
  }

  /// Whether a tensor holds nothing but zeros, such as the biases that some quantisers write for layers without any.
  private static func isZero(_ tensor: SourceTensor, _ source: any ConversionSource) throws(EngineError) -> Bool {
    guard tensor.type != nil, tensor.count < 1 << 24 else { return false }
    let rows = try source.rows(tensor)
    var numbers = [Float](repeating: 0, count: tensor.columns)
    for row in 0..<rows.rows {
      rows.read(row, to: &numbers)
      if numbers.contains(where: { $0 != 0 }) { return false }
    }
    return true
  }

  /// A GGUF file of a GGUF model: the metadata and the order of rows stay.
  init(gguf type: GGUFWeightType, _ options: ConversionOptions, source: GGUFTensorSource) throws(EngineError) {
    var metadata = GGUFMetadataWriter()
    let header = source.files.headers[0]
    let bytes = source.files.files[0].bytes
    for entry in header.entries {
      if entry.key.hasPrefix("split.") || entry.key == "general.file_type" { continue }
      if entry.key == "general.quantization_version" { continue }
      metadata.set(entry.key, verbatim: UnsafeRawBufferPointer(rebasing: bytes[entry.range]))
    }
    metadata.set("general.file_type", size: Self.fileTypes[type] ?? 0)
    metadata.set("general.quantization_version", size: 2)
    var notes: [String] = []
    var steps: [ConversionStep] = []
    for tensor in source.tensors {
      // Divisors of frequencies, and types whose numbers are no weights, stay.
      let isWeight = tensor.name.hasSuffix(".weight") || tensor.name.hasSuffix(".bias")
      guard isWeight, tensor.type != nil || tensor.shape.count >= 2 else {
        steps.append(Self.copy(tensor, source))
        continue
      }
      if tensor.type == nil {
        let selection = TensorSelection(options: options)
        guard type.dtype == nil, !selection.isQuantized(tensor.name, tensor.shape) else {
          throw EngineError(
            .unsupported,
            "\(source.path): tensor \(tensor.name) has type \(tensor.storedAs), whose numbers cannot be read; take a file "
              + "of another type, or keep the tensor as it is with --keep.")
        }
        steps.append(Self.copy(tensor, source))
        continue
      }
      steps.append(Self.rows(tensor, tensor.name, asked: type, options, source, notes: &notes))
    }
    self.source = source
    self.steps = steps
    self.notes = notes
    layout = OutputLayout(gguf: steps.flatMap(\.outputs), metadata: metadata, alignment: header.alignment)
    isDirectory = false
  }

  private static func copy(_ tensor: SourceTensor, _ source: GGUFTensorSource) -> ConversionStep {
    let stored = source.files.tensor(tensor.name)?.tensor
    return ConversionStep(
      tensor: tensor, action: .copy,
      outputs: [
        OutputTensor(
          name: tensor.name, typeName: tensor.storedAs, shape: tensor.shape, byteCount: stored?.byteCount ?? 0,
          typeID: stored?.typeID ?? 0)
      ], writtenAs: tensor.storedAs)
  }
}
