public import ApusCore
public import ApusTensors

/// A decoder as embedding models are often stored: the class is the bare model (`Qwen3Model`), or the names of its weights
/// lack the prefix `model.`, or there is no output layer. A checkpoint of a model that generates is read as it is.
public struct BareDecoder: Sendable {
  /// What the model is, under the name of the class that generates.
  public let configuration: ModelConfiguration
  /// Its weights, under the names that class has for them.
  public let store: any WeightStore

  /// Opens a checkpoint directory.
  /// - Parameter helper: dequantises weights on its threads.
  /// - Throws: `invalidCheckpoint` if a file is missing or broken, `unsupported` if the model needs something that is not
  ///   here.
  public init(directory: String, helper: CPUBackend?) throws(EngineError) {
    let path = directory + "/config.json"
    guard let bytes = try readSmallFile(path) else {
      throw EngineError(
        .invalidCheckpoint, "\(path) does not exist; \(directory) is not a Hugging Face checkpoint directory.")
    }
    let json: JSONValue
    do { json = try JSONValue.parse(bytes) } catch {
      throw EngineError(.invalidCheckpoint, "\(path): \(error).")
    }
    let checkpoint = try SafetensorsCheckpoint(directory: directory)
    try self.init(
      json: QuantizationConfiguration.withSideFile(json, directory: directory), path: path, checkpoint: checkpoint
    ) { quantization in QuantizedCheckpoint(checkpoint, quantization, helper: helper) }
  }

  /// Reads the content of a `config.json` beside weights.
  /// - Parameters:
  ///   - path: names the file in messages.
  ///   - quantized: makes the store of quantised weights.
  package init(
    json: JSONValue, path: String = "config.json", checkpoint: any WeightStore,
    quantized: (QuantizationConfiguration) -> any WeightStore
  ) throws(EngineError) {
    var fields = json.objectValue ?? JSONObject()
    let suffix = "Model"
    if let names = fields["architectures"]?.arrayValue {
      fields["architectures"] = .array(
        names.map { name in
          guard let text = name.stringValue, text.hasSuffix(suffix) else { return name }
          return .string(text.dropLast(suffix.count) + "ForCausalLM")
        })
    }
    var configuration = try ModelConfiguration(json: json.objectValue == nil ? json : .object(fields), path: path)
    let isBare = checkpoint.contains("embed_tokens.weight") && !checkpoint.contains("model.embed_tokens.weight")
    let store = configuration.quantization.map(quantized) ?? checkpoint
    // Without an output layer the embedding table takes its place; nothing is computed with it.
    if !checkpoint.contains("lm_head.weight") { configuration.tiedEmbeddings = true }
    self.configuration = configuration
    guard isBare else {
      self.store = store
      return
    }
    self.store = RenamedWeights(base: store) { name in
      let prefix = "model."
      return name.hasPrefix(prefix) ? String(name.dropFirst(prefix.count)) : name
    }
  }
}
