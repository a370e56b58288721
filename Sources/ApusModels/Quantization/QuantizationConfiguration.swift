import ApusCore

/// How a Hugging Face checkpoint stores its quantised linear layers: `quantization_config` of `config.json`.
///
/// Of rules for activations only that of W8A8 is followed: int8 inputs, symmetric, with a scale for each token computed on
/// the fly. Others (static input scales, an fp8 cache) are left aside: activations stay in float32, which is never less
/// exact than what the file asks for.
public struct QuantizationConfiguration: Sendable, Equatable {
  /// One way to store a matrix [outputs, inputs].
  public enum Scheme: Sendable, Equatable {
    /// GPTQ. `groupSize` inputs share a scale, 0 for all of them; `zeroOffset` is 1 where files store zeros minus one
    /// (format v1) and 0 where they store them as they are (v2); `actOrder` says that `g_idx` must be there.
    case gptq(bits: Int, groupSize: Int, zeroOffset: Int, actOrder: Bool)
    /// AWQ with 4 bits, packed for the GEMM kernel. `groupSize` is 0 for all inputs.
    case awq(groupSize: Int)
    /// Integers of compressed-tensors packed into 32-bit words.
    case packedInteger(bits: Int, scales: Scales, isSymmetric: Bool, actOrder: Bool)
    /// One int8 number for each weight (compressed-tensors).
    case integer8(scales: Scales, isSymmetric: Bool, actOrder: Bool)
    /// One float8 e4m3 number for each weight.
    case float8(scales: Scales)
  }

  /// Which weights share a scale.
  public enum Scales: Sendable, Equatable {
    /// All of a matrix.
    case tensor
    /// An output.
    case channel
    /// That many adjacent inputs of an output.
    case group(Int)
    /// A block of outputs by inputs.
    case block(Int, Int)
    /// A matrix or an output, as the shape of the scales says.
    case tensorOrChannel
  }

  /// A scheme and the layers that it is for.
  public struct Group: Sendable, Equatable {
    /// Names of modules, regular expressions after `re:`, or classes such as `Linear`.
    public var targets: [String]
    public var scheme: Scheme
    /// Whether inputs are to be rounded to int8, symmetrically and with a scale for each token computed on the fly.
    public var roundsInputs = false
  }

  /// The method's name as the file has it, such as `gptq`.
  public var method: String
  /// The schemes; a layer takes the first one whose targets name it, else the first one for its class.
  public var groups: [Group]
  /// Modules that are not quantised: names, leading or trailing parts of names, with `*`, or expressions after `re:`.
  public var ignored: [String]

  /// The scheme of a module such as `model.layers.0.mlp.up_proj`; `nil` if it is not quantised.
  public func scheme(for module: String) -> Scheme? { group(for: module)?.scheme }

  /// The group of a module; `nil` if it is not quantised.
  func group(for module: String) -> Group? {
    if ignored.contains(where: { Self.matches($0, module: module) }) { return nil }
    let byName = groups.first { $0.targets.contains { Self.matches($0, module: module) } }
    return byName ?? groups.first { $0.targets.contains("Linear") }
  }

  /// The method and its schemes in a few words.
  var summary: String {
    func text(_ scales: Scales) -> String {
      switch scales {
      case .tensor: "a scale for each matrix"
      case .channel: "a scale for each output"
      case .group(let size): "groups of \(size)"
      case .block(let height, let width): "blocks of \(height) x \(width)"
      case .tensorOrChannel: "a scale for each matrix or output"
      }
    }
    let schemes = groups.map { group -> String in
      switch group.scheme {
      case .gptq(let bits, let size, _, let actOrder):
        "\(bits) bits\(size > 0 ? ", groups of \(size)" : "")\(actOrder ? ", act-order" : "")"
      case .awq(let size): "4 bits\(size > 0 ? ", groups of \(size)" : "")"
      case .packedInteger(let bits, let scales, let isSymmetric, _):
        "\(bits) bits, \(text(scales))\(isSymmetric ? "" : ", zero points")"
      case .integer8(let scales, let isSymmetric, _):
        "int8, \(text(scales))\(isSymmetric ? "" : ", zero points")\(group.roundsInputs ? ", inputs rounded per token" : "")"
      case .float8(let scales): "fp8, \(text(scales))"
      }
    }
    return ([method] + schemes).joined(separator: "; ")
  }

  /// Whether an entry of a list names a module.
  static func matches(_ entry: String, module: String) -> Bool {
    if entry.hasPrefix("re:") {
      guard let expression = try? Regex(String(entry.dropFirst(3))) else { return false }
      return module.prefixMatch(of: expression) != nil
    }
    if entry.utf8.contains(UInt8(ascii: "*")) { return Wildcard.matches(entry, module) }
    // At dots alone: "gate" in a list means a router, not `gate_proj`.
    return entry == module || module.hasPrefix(entry + ".") || module.hasSuffix("." + entry)
  }
}

extension QuantizationConfiguration {
  /// Methods that are known and not implemented, in words that people know.
  private static let refusedMethods: [String: String] = [
    "bitsandbytes": "bitsandbytes", "exl2": "EXL2", "exl3": "EXL3", "hqq": "HQQ", "quark": "Quark", "mxfp4": "MXFP4",
    "nvfp4": "NVFP4", "aqlm": "AQLM", "quip": "QuIP#", "quip-sharp": "QuIP#", "eetq": "EETQ", "torchao": "torchao",
    "vptq": "VPTQ", "spqr": "SpQR", "higgs": "HIGGS", "bitnet": "BitNet", "fbgemm_fp8": "FBGEMM fp8",
    "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "marlin": "Marlin", "quanto": "Quanto",
    "squeezellm": "SqueezeLLM", "mxfp8": "MXFP8", "fp_quant": "FP-Quant", "gguf": "GGUF inside safetensors",
  ]

  /// Reads `quantization_config`, or `compression_config` as older files call it.
  /// - Returns: `nil` if the checkpoint is not quantised.
  /// - Throws: `unsupported` for a method or a variant that is not implemented, `invalidCheckpoint` for a broken entry.
  init?(_ configuration: ConfigurationFields) throws(EngineError) {
    guard let (key, json) = Self.entry(configuration) else { return nil }
    let fields = try ConfigurationFields(json, path: "\(configuration.path): \(key)")
    let name = try fields.text("quant_method")?.lowercased()
    let algorithm = try fields.text("quant_algo")
    guard let method = name ?? (algorithm == nil ? nil : "modelopt") else {
      // compressed-tensors did not name itself at first.
      guard json["config_groups"] != nil, json["format"] != nil else {
        throw fields.invalid("quant_method is missing, so nothing says how the weights are stored")
      }
      try self.init(compressedTensors: fields)
      return
    }
    switch method {
    case "gptq": try self.init(gptq: fields)
    case "awq": try self.init(awq: fields)
    case "compressed-tensors", "compressed_tensors": try self.init(compressedTensors: fields)
    case "fp8": try self.init(fp8: fields)
    case "modelopt":
      guard algorithm == "FP8" else {
        throw Self.refusal(fields, "ModelOpt's \(algorithm ?? "format without quant_algo")")
      }
      try self.init(fp8: fields)
    default: throw Self.refusal(fields, Self.refusedMethods[method] ?? "the method \(method)")
    }
  }

  /// The entry that describes the quantisation, and its key.
  private static func entry(_ configuration: ConfigurationFields) -> (String, JSONValue)? {
    for key in ["quantization_config", "compression_config"] + sideFiles {
      guard let json = configuration.value(key) else { continue }
      if key == "compression_config", let inner = json["quantization_config"], !inner.isNull { return (key, inner) }
      return (key, json)
    }
    return nil
  }

  /// Files beside `config.json` in which some tools describe the quantisation: AutoGPTQ, AutoAWQ and ModelOpt.
  private static let sideFiles = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"]

  /// A `config.json` with what a file beside it says of the quantisation, under that file's name, if it says nothing
  /// itself.
  /// - Throws: `invalidCheckpoint` if such a file is broken.
  static func withSideFile(_ json: JSONValue, directory: String) throws(EngineError) -> JSONValue {
    guard var config = json.objectValue,
      ["quantization_config", "compression_config"].allSatisfy({ config[$0].map(\.isNull) ?? true })
    else { return json }
    for name in sideFiles {
      let path = "\(directory)/\(name)"
      guard let bytes = try readSmallFile(path, limit: 1 << 20) else { continue }
      let content: JSONValue
      do { content = try JSONValue.parse(bytes) } catch {
        throw EngineError(.invalidCheckpoint, "\(path): \(error).")
      }
      guard var fields = content.objectValue else {
        throw EngineError(.invalidCheckpoint, "\(path): expected an object, found \(content.kindName).")
      }
      switch name {
      case "hf_quant_config.json":
        guard let inner = content["quantization"]?.objectValue else {
          throw EngineError(.invalidCheckpoint, "\(path): \"quantization\" must be an object.")
        }
        // Without an algorithm only the K/V cache is quantised.
        guard let algorithm = inner["quant_algo"], !algorithm.isNull else { return json }
        fields = inner
        fields["quant_method"] = "modelopt"
      case "quant_config.json": if fields["quant_method"] == nil { fields["quant_method"] = "awq" }
      default: if fields["quant_method"] == nil { fields["quant_method"] = "gptq" }
      }
      config[name] = .object(fields)
      return .object(config)
    }
    return json
  }

  private static func refusal(_ fields: ConfigurationFields, _ what: String) -> EngineError {
    fields.unsupported(
      "the weights are quantised with \(what), which cannot be read; these can: GPTQ and AWQ, compressed-tensors "
        + "(int4, int8, fp8), fp8 with scales for blocks or tensors, and unquantised checkpoints")
  }

  /// GPTQ as AutoGPTQ and GPTQModel write it.
  private init(gptq fields: ConfigurationFields) throws(EngineError) {
    let bits = try fields.size("bits", limit: 32)
    guard bits == 4 || bits == 8 else {
      throw fields.unsupported("GPTQ with \(bits) bits is not implemented; 4 and 8 are")
    }
    let format = try fields.text("checkpoint_format") ?? "gptq"
    guard format == "gptq" || format == "gptq_v2", try fields.flag("is_marlin_format") != true else {
      throw fields.unsupported(
        "the GPTQ weights are stored in the format \(format == "gptq" ? "marlin" : format); gptq and gptq_v2 can be "
          + "read")
    }
    if let dynamic = fields.value("dynamic"), dynamic.objectValue?.isEmpty != true {
      throw fields.unsupported("GPTQ with rules for single modules (dynamic) is not implemented")
    }
    method = "gptq"
    groups = [
      Group(
        targets: ["Linear"],
        scheme: .gptq(
          bits: bits, groupSize: try Self.groupSize(fields), zeroOffset: format == "gptq" ? 1 : 0,
          actOrder: try fields.flag("desc_act") ?? false))
    ]
    ignored = try Self.names(fields, ["modules_to_not_convert"])
  }

  /// AWQ as AutoAWQ writes it.
  private init(awq fields: ConfigurationFields) throws(EngineError) {
    let key = fields.value("bits") == nil && fields.value("w_bit") != nil ? "w_bit" : "bits"
    let bits = try fields.size(key, limit: 32)
    guard bits == 4 else { throw fields.unsupported("AWQ with \(bits) bits is not implemented; 4 is") }
    if let backend = try fields.text("backend"), backend.lowercased() != "autoawq" {
      throw fields.unsupported("AWQ weights as \(backend) packs them are not implemented; those of AutoAWQ are")
    }
    let version = try fields.text("version")?.lowercased() ?? "gemm"
    guard version == "gemm" else {
      throw fields.unsupported(
        "the AWQ weights are packed for the kernel \(version); those packed for gemm can be read")
    }
    method = "awq"
    let sizeKey =
      fields.value("group_size") == nil && fields.value("q_group_size") != nil ? "q_group_size" : "group_size"
    groups = [Group(targets: ["Linear"], scheme: .awq(groupSize: try Self.groupSize(fields, sizeKey)))]
    ignored = try Self.names(fields, ["modules_to_not_convert"])
  }

  /// fp8 as DeepSeek and Qwen (blocks), vLLM's tools and ModelOpt (tensors) write it.
  private init(fp8 fields: ConfigurationFields) throws(EngineError) {
    let format = try fields.text("fmt") ?? "e4m3"
    guard format == "e4m3" || format == "float8_e4m3fn" else {
      throw fields.unsupported("fp8 numbers of the kind \(format) are not implemented; e4m3 is")
    }
    if let isSerialized = try fields.flag("is_checkpoint_fp8_serialized"), !isSerialized {
      // The file asks for a quantisation at load time; its own weights are plain.
      groups = []
    } else if let block = fields.value("weight_block_size") {
      groups = [Group(targets: ["Linear"], scheme: .float8(scales: try Self.block(block, "weight_block_size", fields)))]
    } else {
      groups = [Group(targets: ["Linear"], scheme: .float8(scales: .tensorOrChannel))]
    }
    method = "fp8"
    ignored = try Self.names(fields, ["modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules"])
  }

  /// compressed-tensors as llm-compressor writes it.
  private init(compressedTensors fields: ConfigurationFields) throws(EngineError) {
    if let format = fields.value("sparsity_config")?["format"]?.stringValue, format != "dense" {
      throw fields.unsupported("sparse weights (compressed-tensors format \(format)) are not implemented")
    }
    if let transform = fields.value("transform_config"), transform["config_groups"]?.objectValue?.isEmpty == false {
      throw fields.unsupported("compressed-tensors with transforms (transform_config) is not implemented")
    }
    let format = try fields.text("format")
    guard let entries = fields.value("config_groups")?.objectValue, !entries.isEmpty else {
      throw fields.invalid("config_groups must be an object with at least one group")
    }
    var groups: [Group] = []
    for (name, json) in entries {
      let group = try ConfigurationFields(json, path: "\(fields.path): config_groups: \(name)")
      guard let description = group.value("weights") else { continue }
      let weights = try ConfigurationFields(description, path: group.path)
      let format = try group.text("format") ?? format
      groups.append(
        Group(
          targets: try Self.names(group, ["targets"]), scheme: try Self.scheme(weights, format: format ?? "absent"),
          roundsInputs: Self.roundsInputs(group.value("input_activations"))))
    }
    method = "compressed-tensors"
    self.groups = groups
    ignored = try Self.names(fields, ["ignore"])
  }

  /// Whether a description of input activations is that of the engine's int8 format.
  private static func roundsInputs(_ json: JSONValue?) -> Bool {
    json?["num_bits"]?.intValue == 8 && (json?["type"]?.stringValue ?? "int") == "int"
      && json?["dynamic"]?.boolValue == true && json?["strategy"]?.stringValue == "token"
      && json?["symmetric"]?.boolValue != false
  }

  /// The scheme of one group of compressed-tensors.
  private static func scheme(_ weights: ConfigurationFields, format: String) throws(EngineError) -> Scheme {
    let bits = try weights.size("num_bits", limit: 64)
    let type = try weights.text("type") ?? "int"
    let isSymmetric = try weights.flag("symmetric") ?? true
    let groupSize = weights.value("group_size")?.intValue ?? -1
    let strategy = try weights.text("strategy") ?? (groupSize > 0 ? "group" : groupSize < 0 ? "channel" : "tensor")
    let scales: Scales
    switch strategy {
    case "tensor": scales = .tensor
    case "channel": scales = .channel
    case "group": scales = .group(try weights.size("group_size", limit: 1 << 24))
    case "block":
      guard let block = weights.value("block_structure") else {
        throw weights.invalid("the strategy block needs a block_structure")
      }
      scales = try self.block(block, "block_structure", weights)
    default: throw weights.unsupported("scales by the strategy \(strategy) are not implemented")
    }
    // Older files have a boolean: true for what is called "group" now. "weight" and "static" leave groups in order.
    let order = weights.value("actorder")
    let actOrder = order?.boolValue ?? (order?.stringValue == "group")
    switch (format, type, bits) {
    case ("pack-quantized", "int", 4), ("pack-quantized", "int", 8):
      return .packedInteger(bits: bits, scales: scales, isSymmetric: isSymmetric, actOrder: actOrder)
    case ("int-quantized", "int", 8), ("naive-quantized", "int", 8):
      return .integer8(scales: scales, isSymmetric: isSymmetric, actOrder: actOrder)
    case ("float-quantized", "float", 8), ("naive-quantized", "float", 8):
      return .float8(scales: scales)
    default:
      throw refusal(weights, "compressed-tensors' \(format) of \(type) numbers with \(bits) bits")
    }
  }

  /// Inputs that share a scale; -1 in the file and 0 here for all of them.
  private static func groupSize(_ fields: ConfigurationFields, _ key: String = "group_size") throws(EngineError) -> Int
  {
    guard let size = fields.value(key)?.intValue, size == -1 || (1...1 << 24).contains(size) else {
      throw fields.invalid("\(key) must be -1 or an integer from 1 to \(1 << 24)")
    }
    return max(size, 0)
  }

  private static func block(
    _ json: JSONValue, _ key: String, _ fields: ConfigurationFields
  ) throws(EngineError) -> Scales {
    // compressed-tensors once wrote "128x128".
    let sizes =
      json.arrayValue?.map { $0.intValue ?? 0 } ?? json.stringValue?.split(separator: "x").map { Int($0) ?? 0 } ?? []
    guard sizes.count == 2, sizes.allSatisfy({ (1...1 << 24).contains($0) }) else {
      throw fields.invalid("\(key) must be an array of two positive integers")
    }
    return .block(sizes[0], sizes[1])
  }

  /// The names in lists under any of some keys.
  private static func names(_ fields: ConfigurationFields, _ keys: [String]) throws(EngineError) -> [String] {
    var names: [String] = []
    for key in keys {
      guard let value = fields.value(key) else { continue }
      for element in value.arrayValue ?? [.null] {
        guard let name = element.stringValue, !name.isEmpty else {
          throw fields.invalid("\(key) must be an array of names")
        }
        if name.hasPrefix("re:") {
          do { _ = try Regex(String(name.dropFirst(3))) } catch {
            throw fields.invalid("\(key) holds \(name), which is not a regular expression")
          }
        }
        names.append(name)
      }
    }
    return names
  }
}
