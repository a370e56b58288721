import ApusCore
import ApusTensors

/// What a checkpoint holds and whether it can be served, found without loading a weight.
package struct CheckpointInspection: Sendable {
  /// One fact.
  package struct Line: Sendable, Equatable {
    /// What the fact is about, such as `architecture`.
    package var label: String
    package var text: String
  }

  /// The facts, most basic first.
  package private(set) var lines: [Line] = []
  /// Why the checkpoint would be refused; empty if nothing found speaks against serving it.
  package private(set) var refusals: [String] = []

  /// Looks at a GGUF file, a directory with one, or a Hugging Face checkpoint directory.
  package init(path: String) {
    do throws(EngineError) {
      if let paths = try GGUFFiles.find(path) {
        try inspect(GGUFModelFiles(paths: paths))
      } else {
        inspect(directory: path)
      }
    } catch {
      refusals.append(error.message)
    }
  }

  private mutating func add(_ label: String, _ text: String) { lines.append(Line(label: label, text: text)) }

  private mutating func inspect(_ files: GGUFModelFiles) throws(EngineError) {
    let parts = files.files.count
    add("format", "GGUF version \(files.headers[0].version)\(parts > 1 ? ", \(parts) parts" : "")")
    var totals: [String: (count: Int, bytes: Int)] = [:]
    for tensor in files.tensors {
      totals[tensor.typeName, default: (0, 0)].count += 1
      totals[tensor.typeName, default: (0, 0)].bytes += tensor.byteCount
    }
    do throws(EngineError) {
      let checkpoint = try GGUFCheckpoint(files)
      describe(checkpoint.configuration)
      refusals += checkpoint.configuration.refusals(of: checkpoint.listing, origin: files.path)
      for tensor in checkpoint.listing
      where tensor.shape.count == 1 && !["F32", "F16", "BF16"].contains(tensor.storedAs) {
        refusals.append(
          "\(files.path): \(tensor.name) is a vector of type \(tensor.storedAs); F32, F16 and BF16 can be read.")
      }
    } catch {
      if let name = files.metadata["general.architecture"]?.stringValue { add("architecture", name) }
      refusals.append(error.message)
    }
    describe(totals)
    if let model = files.metadata["tokenizer.ggml.model"]?.stringValue {
      let pre = files.metadata["tokenizer.ggml.pre"]?.stringValue
      let tokens = files.metadata["tokenizer.ggml.tokens"]?.arrayValue?.count ?? 0
      add("tokenizer", "\(model)\(pre.map { ", \($0)" } ?? ""), \(tokens) tokens")
    } else {
      add("tokenizer", "none")
      refusals.append("\(files.path): there is no tokenizer in the file; name one with --tokenizer-path.")
    }
    add("chat template", files.metadata["tokenizer.chat_template"] == nil ? "none" : "in the metadata")
  }

  private mutating func inspect(directory: String) {
    add("format", "safetensors")
    var configuration: ModelConfiguration?
    do throws(EngineError) {
      let read = try ModelConfiguration(directory: directory)
      describe(read)
      configuration = read
    } catch {
      refusals.append(error.message)
    }
    do throws(EngineError) {
      let checkpoint = try SafetensorsCheckpoint(directory: directory)
      describe(checkpoint.typeTotals)
      if let configuration, let quantization = configuration.quantization {
        add("quantization", quantization.summary)
        let store = QuantizedCheckpoint(checkpoint, quantization)
        refusals += configuration.refusals(of: try store.listing(), origin: checkpoint.origin)
        refusals += store.missingParameters()
      } else if let configuration {
        refusals += configuration.refusals(of: checkpoint.listing, origin: checkpoint.origin)
      }
    } catch {
      refusals.append(error.message)
    }
    do throws(EngineError) {
      _ = try GenerationConfiguration(
        directory: directory, vocabularySize: configuration?.vocabularySize ?? Int(Int32.max))
    } catch {
      refusals.append(error.message)
    }
    func has(_ name: String) -> Bool { ((try? readSmallFile("\(directory)/\(name)")) ?? nil) != nil }
    let tokenizers = ["tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt"]
    if let name = tokenizers.first(where: has) {
      add("tokenizer", name)
    } else {
      add("tokenizer", "none")
      refusals.append("\(directory) holds none of \(tokenizers.joined(separator: ", ")).")
    }
    if has("chat_template.jinja") {
      add("chat template", "chat_template.jinja")
    } else if let bytes = (try? readSmallFile("\(directory)/tokenizer_config.json")) ?? nil,
      let json = try? JSONValue.parse(bytes), json["chat_template"] != nil
    {
      add("chat template", "tokenizer_config.json")
    } else {
      add("chat template", has("chat_template.json") ? "chat_template.json" : "none")
    }
  }

  private mutating func describe(_ configuration: ModelConfiguration) {
    add("architecture", configuration.architecture)
    add("parameters", "\(configuration.parameterCount)")
    let cached =
      if let latent = configuration.latentAttention {
        "latents of \(latent.cacheDimension) for K/V"
      } else {
        "\(configuration.kvHeads) for K/V"
      }
    add(
      "layers",
      "\(configuration.layerCount) of width \(configuration.hiddenSize), \(configuration.queryHeads) heads of "
        + "\(configuration.headDimension), \(cached)")
    if let experts = configuration.experts {
      add(
        "experts",
        "\(experts.expertCount) of width \(experts.intermediateSize), \(experts.expertsPerToken) for each token, from layer "
          + "\(experts.firstLayer) on")
    }
    add("vocabulary", "\(configuration.vocabularySize)")
    add("context", "\(configuration.defaultContextLength) tokens")
  }

  private mutating func describe(_ totals: [String: (count: Int, bytes: Int)]) {
    for (type, total) in totals.sorted(by: { ($1.value.bytes, $0.key) < ($0.value.bytes, $1.key) }) {
      add("tensors", "\(total.count) of \(type), \(total.bytes) bytes")
    }
  }
}
