package import ApusCore
import ApusTensors

/// A tensor of a checkpoint under its Hugging Face name, as the numbers that it stands for.
package struct ListedTensor: Sendable, Equatable {
  package var name: String
  /// The lengths of the dimensions of the numbers, not of what stores them.
  package var shape: [Int]
  /// How it is stored: a type's name such as `BF16` or `Q4_K`, or a method such as `gptq`.
  package var storedAs: String
  /// Whether it is made of float32, float16 or bfloat16 numbers or is quantised; others can only be copied.
  package var isNumeric: Bool
}

extension SafetensorsCheckpoint {
  /// All tensors, by name.
  package var listing: [ListedTensor] {
    tensorNames.sorted().compactMap { name in
      guard let (_, entry) = entry(name) else { return nil }
      return ListedTensor(
        name: name, shape: entry.shape, storedAs: entry.typeName,
        isNumeric: SafetensorsFile.weightTypes[entry.typeName] != nil)
    }
  }

  /// The bytes of a tensor of any type, with the file that holds them; `nil` if there is none of that name.
  package func stored(_ name: String) -> (bytes: UnsafeRawBufferPointer, typeName: String, owner: SafetensorsFile)? {
    guard let (file, entry) = entry(name) else { return nil }
    return (file.bytes(of: entry), entry.typeName, file)
  }
}

extension QuantizedCheckpoint {
  /// Last parts of the names of tensors that describe a quantised weight and are no weights themselves.
  private static let parameters: Set<String> = [
    "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape",
    "weight_g_idx", "input_scale", "output_scale", "input_zero_point", "output_zero_point", "activation_scale",
    "k_scale", "v_scale", "q_scale", "prob_scale",
  ]

  /// All weights, by name: a quantised one with the shape of its matrix, without the tensors that describe it.
  /// - Throws: `unsupported` if a tensor is stored in a way that the configuration does not explain.
  package func listing() throws(EngineError) -> [ListedTensor] {
    var result: [ListedTensor] = []
    for name in checkpoint.tensorNames.sorted() {
      guard let (file, entry) = checkpoint.entry(name) else { continue }
      let part = name.lastIndex(of: ".").map { String(name[name.index(after: $0)...]) } ?? name
      if Self.parameters.contains(part) { continue }
      let module = String(name.dropLast(part.count + 1))
      let scheme = quantization.scheme(for: module)
      let shape: [Int]
      switch (part, scheme) {
      case ("qweight", .gptq(let bits, _, _, _)?) where entry.shape.count == 2:
        shape = [entry.shape[1], entry.shape[0] * 32 / bits]
      case ("qweight", .awq?) where entry.shape.count == 2:
        shape = [entry.shape[1] * 8, entry.shape[0]]
      case ("weight_packed", .packedInteger(let bits, _, _, _)?) where entry.shape.count == 2:
        var inputs = entry.shape[1] * 32 / bits
        if let (bytes, type, _) = checkpoint.stored(module + ".weight_shape"), type == "I64", bytes.count == 16 {
          let stated = Int(bytes.loadUnaligned(fromByteOffset: 8, as: Int64.self))
          // Padding of the last word at most; other numbers are refused when the weight is read.
          if stated > inputs - 32 / bits, stated <= inputs { inputs = stated }
        }
        shape = [entry.shape[0], inputs]
      case ("weight", .integer8?) where entry.typeName == "I8", ("weight", .float8?) where entry.typeName == "F8_E4M3":
        shape = entry.shape
      case ("qweight", _), ("weight_packed", _):
        throw EngineError(
          .unsupported,
          "\(file.file.path): tensor \(name) is quantised, but the configuration does not say so of \(module), or "
            + "stores it otherwise.")
      default:
        result.append(
          ListedTensor(
            name: name, shape: entry.shape, storedAs: entry.typeName,
            isNumeric: SafetensorsFile.weightTypes[entry.typeName] != nil))
        continue
      }
      result.append(
        ListedTensor(name: module + ".weight", shape: shape, storedAs: quantization.method, isNumeric: true))
    }
    return result
  }

  /// Why quantised weights cannot be read: one sentence for each tensor that describes one and is missing.
  package func missingParameters(limit: Int = 16) -> [String] {
    var sentences: [String] = []
    for name in checkpoint.tensorNames.sorted() {
      let part = name.lastIndex(of: ".").map { String(name[name.index(after: $0)...]) } ?? name
      let module = String(name.dropLast(part.count + 1))
      let needed: [[String]]
      switch (part, quantization.scheme(for: module)) {
      case ("qweight", .gptq(_, _, _, let actOrder)?):
        needed = [["qzeros"], ["scales"]] + (actOrder ? [["g_idx"]] : [])
      case ("qweight", .awq?): needed = [["qzeros"], ["scales"]]
      case ("weight_packed", .packedInteger(_, _, let isSymmetric, let actOrder)?):
        needed =
          [["weight_scale"]] + (isSymmetric ? [] : [["weight_zero_point"]]) + (actOrder ? [["weight_g_idx"]] : [])
      case ("weight", .integer8(_, let isSymmetric, _)?) where checkpoint.dtype(of: name) == nil:
        needed = [["weight_scale"]] + (isSymmetric ? [] : [["weight_zero_point"]])
      case ("weight", .float8?) where checkpoint.dtype(of: name) == nil:
        needed = [["weight_scale", "weight_scale_inv"]]
      default: continue
      }
      for names in needed where !names.contains(where: { checkpoint.contains("\(module).\($0)") }) {
        sentences.append(
          "\(origin): tensor \(module).\(names[0]) is missing, which the method \(quantization.method) needs.")
        if sentences.count == limit { return sentences }
      }
    }
    return sentences
  }

  /// The bytes of a tensor that is not quantised.
  package func stored(_ name: String) -> (bytes: UnsafeRawBufferPointer, typeName: String, owner: SafetensorsFile)? {
    checkpoint.stored(name)
  }
}

extension GGUFCheckpoint {
  /// All weights under their Hugging Face names.
  package var listing: [ListedTensor] {
    names.sorted { $0.key < $1.key }.compactMap { name, own in
      guard let tensor = files.tensor(own)?.tensor else { return nil }
      return ListedTensor(
        name: name, shape: tensor.dimensions.reversed(), storedAs: tensor.typeName, isNumeric: true)
    }
  }
}

/// The names that GGUF files give to weights and classes.
package enum GGUFNames {
  /// The GGUF architecture of a Hugging Face class; `nil` if there is none among those implemented.
  package static func architecture(ofClass name: String) -> String? {
    // Mistral's class is Llama's with a window.
    if name == "MistralForCausalLM" { return "llama" }
    return GGUFMetadata.classes.first { $0.value == name }?.key
  }

  /// The GGUF name of a weight.
  package static func name(of weight: String) -> String? {
    if let known = GGUFMetadata.modelNames.first(where: { $0.value == weight }) { return known.key }
    let parts = weight.split(separator: ".", omittingEmptySubsequences: false)
    guard parts.count >= 5, parts[0] == "model", parts[1] == "layers", let layer = Int(parts[2]), layer >= 0,
      String(layer) == parts[2], let kind = parts.last, kind == "weight" || kind == "bias"
    else { return nil }
    let inner = parts[3..<parts.count - 1].joined(separator: ".")
    guard let own = GGUFMetadata.layerNames.first(where: { $0.value == inner }) else { return nil }
    return "blk.\(layer).\(own.key).\(kind)"
  }
}

extension ModelConfiguration {
  /// The shape of every weight of the model by its Hugging Face name; `nil` for classes that are not dense decoders of
  /// Llama's kind.
  package var weightShapes: [String: [Int]]? {
    guard ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"].contains(architecture)
    else { return nil }
    var shapes = ["model.embed_tokens.weight": [vocabularySize, hiddenSize], "model.norm.weight": [hiddenSize]]
    if !tiedEmbeddings { shapes["lm_head.weight"] = [vocabularySize, hiddenSize] }
    let (query, keyValue) = (queryHeads * headDimension, kvHeads * headDimension)
    for layer in 0..<layerCount {
      let name = "model.layers.\(layer)"
      func linear(_ part: String, _ outputs: Int, _ inputs: Int, _ hasBias: Bool) {
        shapes["\(name).\(part).weight"] = [outputs, inputs]
        if hasBias { shapes["\(name).\(part).bias"] = [outputs] }
      }
      linear("self_attn.q_proj", query, hiddenSize, qkvBias)
      linear("self_attn.k_proj", keyValue, hiddenSize, qkvBias)
      linear("self_attn.v_proj", keyValue, hiddenSize, qkvBias)
      linear("self_attn.o_proj", hiddenSize, query, attentionOutputBias)
      linear("mlp.gate_proj", intermediateSize, hiddenSize, mlpBias)
      linear("mlp.up_proj", intermediateSize, hiddenSize, mlpBias)
      linear("mlp.down_proj", hiddenSize, intermediateSize, mlpBias)
      shapes["\(name).input_layernorm.weight"] = [hiddenSize]
      shapes["\(name).post_attention_layernorm.weight"] = [hiddenSize]
      if queryKeyNorm {
        shapes["\(name).self_attn.q_norm.weight"] = [headDimension]
        shapes["\(name).self_attn.k_norm.weight"] = [headDimension]
      }
    }
    return shapes
  }

  /// Why a checkpoint's tensors are not those of the model: one sentence for each weight that is missing, of another shape
  /// or of a type that cannot be read, up to a limit.
  package func refusals(of listing: [ListedTensor], origin: String, limit: Int = 16) -> [String] {
    guard var expected = weightShapes else { return [] }
    let found = Dictionary(listing.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
    // A tied matrix may be stored under either of its two names.
    let table = "model.embed_tokens.weight"
    if tiedEmbeddings, found[table] == nil, found["lm_head.weight"] != nil {
      expected["lm_head.weight"] = expected.removeValue(forKey: table)
    }
    var sentences: [String] = []
    for (name, shape) in expected.sorted(by: { $0.key < $1.key }) {
      guard let tensor = found[name] else {
        sentences.append("\(origin): tensor \(name) is missing; expected one of shape \(shape).")
        continue
      }
      if tensor.shape != shape {
        sentences.append("\(origin): tensor \(name) has shape \(tensor.shape), but the model needs \(shape).")
      } else if !tensor.isNumeric {
        sentences.append("\(origin): tensor \(name) has type \(tensor.storedAs), which weights cannot have.")
      }
    }
    if sentences.count > limit {
      sentences = Array(sentences[..<limit]) + ["\(origin): so it is with \(sentences.count - limit) further tensors."]
    }
    return sentences
  }
}
