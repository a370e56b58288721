/// Which files of a repository are wanted.
package struct FileSelection: Sendable, Equatable {
  /// What the files are for.
  package enum Purpose: Sendable {
    /// Running the model.
    case model
    /// Turning text into tokens and conversations into text: everything but weights, where they are apart.
    case tokenizer
  }

  /// What the files are for, where no pattern says which.
  package var purpose = Purpose.model
  /// Patterns of files to take instead of what Apus would choose.
  package var include: [String] = []
  /// Patterns of files to leave out.
  package var exclude: [String] = []
  /// Takes everything that `exclude` leaves.
  package var takesAll = false
  /// The form of a GGUF model, such as `Q4_K_M`.
  package var quantization: String?

  /// Chooses what running the model needs.
  package init(purpose: Purpose = .model, quantization: String? = nil) {
    self.purpose = purpose
    self.quantization = quantization
  }

  /// Files chosen and left.
  package struct Choice: Sendable, Equatable {
    /// The files to have, small ones and configurations before weights.
    package var files: [HubFile] = []
    /// The files not taken, each with the reason in a word or two.
    package var leftOut: [(file: HubFile, reason: String)] = []
    /// The GGUF file that stands for the model, if it is one.
    package var mainFile: String?
    /// What was chosen among several possibilities, as a sentence.
    package var note: String?

    package static func == (left: Choice, right: Choice) -> Bool {
      left.files == right.files && left.mainFile == right.mainFile && left.note == right.note
        && left.leftOut.map(\.file) == right.leftOut.map(\.file)
        && left.leftOut.map(\.reason) == right.leftOut.map(\.reason)
    }
  }

  /// Chooses among the files of a repository.
  /// - Parameter repository: its name, for messages.
  /// - Throws: `nothingToPull` if nothing fits.
  package func choose(from files: [HubFile], of repository: String) throws(HubError) -> Choice {
    let excluded = exclude.map(Glob.init)
    var choice = Choice()
    var candidates: [HubFile] = []
    for file in files {
      if excluded.contains(where: { $0.matches(file.path) }) {
        choice.leftOut.append((file, "--exclude"))
      } else {
        candidates.append(file)
      }
    }
    if !include.isEmpty || takesAll {
      let included = include.map(Glob.init)
      for file in candidates {
        if takesAll || included.contains(where: { $0.matches(file.path) }) {
          choice.files.append(file)
        } else {
          choice.leftOut.append((file, "not in --include"))
        }
      }
      guard !choice.files.isEmpty else {
        throw HubError(
          .nothingToPull,
          takesAll
            ? "\(repository) holds no file\(exclude.isEmpty ? "" : " that --exclude leaves")."
            : "No file of \(repository) matches \(include.map { "'\($0)'" }.joined(separator: " or "));"
              + " it holds \(examples(files))."
        )
      }
      let models = GGUFModel.models(in: choice.files)
      if models.count == 1 && !choice.files.contains(where: { $0.path.hasSuffix(".safetensors") }) {
        choice.mainFile = models[0].parts[0].path
      }
    } else {
      let weights = try chooseWeights(from: candidates, of: repository, &choice)
      let chosen = Set(weights.map(\.path))
      for file in candidates {
        if chosen.contains(file.path) { continue }
        if choice.mainFile == nil && Self.isNeeded(file.path) {
          choice.files.append(file)
        } else {
          choice.leftOut.append((file, Self.reason(file.path)))
        }
      }
      choice.files += weights
    }
    // What describes the weights comes first: whoever sees weights then sees everything.
    choice.files = choice.files.filter { !Self.isWeights($0.path) } + choice.files.filter { Self.isWeights($0.path) }
    return choice
  }

  private func chooseWeights(
    from files: [HubFile], of repository: String, _ choice: inout Choice
  ) throws(HubError) -> [HubFile] {
    let tensors = files.filter { !$0.path.contains("/") && $0.path.hasSuffix(".safetensors") }
    let models = GGUFModel.models(in: files)
    if quantization == nil, purpose == .tokenizer,
      files.contains(where: { Self.isNeeded($0.path) && Self.tokenizerNames.contains($0.path) })
    {
      return []
    }
    if let quantization {
      let (model, others) = try GGUFModel.pick(quantization, from: models, of: repository)
      choice.mainFile = model.parts[0].path
      choice.note = others
      return model.parts
    }
    if tensors.isEmpty && !models.isEmpty {
      let (model, note) = try GGUFModel.pickDefault(from: models, of: repository)
      choice.mainFile = model.parts[0].path
      choice.note = note
      return model.parts
    }
    guard !tensors.isEmpty else {
      if purpose == .tokenizer { return [] }
      let others = files.filter { Self.isWeights($0.path) }
      throw HubError(
        .nothingToPull,
        "\(repository) holds no model that Apus can read (*.safetensors or *.gguf), but \(examples(others.isEmpty ? files : others))."
          + " '--all' or '--include' pulls it all the same.")
    }
    if purpose == .tokenizer { return [] }
    // Where there is an index its shards are the model; anything else would be the same weights once more.
    if files.contains(where: { $0.path == "model.safetensors.index.json" }) {
      let shard = Glob("model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors")
      let shards = tensors.filter { shard.matches($0.path) }
      return shards.isEmpty ? tensors.filter { !$0.path.hasPrefix("consolidated") } : shards
    }
    if let single = tensors.first(where: { $0.path == "model.safetensors" }) { return [single] }
    return tensors
  }

  /// Names under which a tokenizer is found.
  static let tokenizerNames: Set<String> = [
    "tokenizer.json", "tokenizer.model", "tiktoken.model", "qwen.tiktoken", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json",
  ]

  /// Configurations, tokenizers and chat templates: the small files that a model needs.
  static func isNeeded(_ path: String) -> Bool {
    if path.hasPrefix("additional_chat_templates/") && path.hasSuffix(".jinja") { return true }
    // How an embedding model pools, which its modules.json refers to.
    if path.hasSuffix("_Pooling/config.json") && path.count(where: { $0 == "/" }) == 1 { return true }
    guard !path.contains("/") else { return false }
    if tokenizerNames.contains(path) || path == "merges.txt" { return true }
    if path.hasSuffix(".jinja") || path.hasSuffix(".tiktoken") || path.hasPrefix("tokenizer.model.") { return true }
    guard path.hasSuffix(".json") else { return false }
    let foreign = ["pytorch_model", "tf_model", "flax_model", "consolidated", "trainer_state", "optimizer"]
    return !foreign.contains { path.hasPrefix($0) }
  }

  /// Whether a file holds numbers of a model, in any format.
  static func isWeights(_ path: String) -> Bool {
    [
      ".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".ot",
      ".tflite", ".mlmodel", ".pkl",
    ].contains { path.hasSuffix($0) }
  }

  private static func reason(_ path: String) -> String {
    if path.hasSuffix(".gguf") { return "other GGUF files" }
    if path.hasSuffix(".safetensors") { return "other safetensors" }
    if isWeights(path) { return "weights of other programs" }
    if path.hasSuffix(".py") || path.hasSuffix(".ipynb") { return "code" }
    if path.contains("/") { return "subfolders" }
    return "documents and the rest"
  }

  private func examples(_ files: [HubFile]) -> String {
    guard !files.isEmpty else { return "no file" }
    let shown = files.prefix(8).map { printable($0.path, limit: 100) }.joined(separator: ", ")
    return shown + (files.count > 8 ? " and \(files.count - 8) more" : "")
  }
}

/// A GGUF model of a repository: one file, or the parts of a split one.
struct GGUFModel: Sendable, Equatable {
  /// The path without `.gguf` and without the number of the part.
  var stem: String
  /// The files in the order of their numbers.
  var parts: [HubFile]
  /// How many parts the names speak of.
  var count: Int

  /// The models among files. Projectors of vision models (`mmproj`) and importance matrices are none.
  static func models(in files: [HubFile]) -> [GGUFModel] {
    var models: [String: GGUFModel] = [:]
    var order: [String] = []
    for file in files where file.path.hasSuffix(".gguf") {
      let name = file.path.split(separator: "/").last.map(String.init)?.lowercased() ?? ""
      if name.hasPrefix("mmproj") || name.hasPrefix("imatrix") || name.contains("-mmproj") { continue }
      let (stem, count) = split(file.path)
      if models[stem] == nil { order.append(stem) }
      models[stem, default: GGUFModel(stem: stem, parts: [], count: count)].parts.append(file)
    }
    return order.map { stem in
      var model = models[stem]!
      model.parts.sort { $0.path < $1.path }
      return model
    }
  }

  /// The name without part number and the number of parts: `x-00001-of-00003.gguf` is `x` and 3.
  private static func split(_ path: String) -> (stem: String, count: Int) {
    let stem = String(path.dropLast(".gguf".count))
    let bytes = Array(stem.utf8)
    let tail = Array("-00000-of-00000".utf8)
    guard bytes.count > tail.count else { return (stem, 1) }
    for (index, pattern) in tail.enumerated() {
      let byte = bytes[bytes.count - tail.count + index]
      guard pattern == 0x30 ? (0x30...0x39).contains(byte) : byte == pattern else { return (stem, 1) }
    }
    return (String(stem.dropLast(tail.count)), Int(stem.suffix(5)) ?? 1)
  }

  /// Whether the file's name or a folder on the way says that this is the form named.
  private func isForm(_ form: String, strictly: Bool) -> Bool {
    let form = form.lowercased()
    let parts = stem.lowercased().split(separator: "/").map(String.init)
    return parts.contains { part in
      if part == form || part.hasSuffix("." + form) { return true }
      guard part.hasSuffix("-" + form) else { return false }
      // 'UD-Q4_K_XL' is another form than 'Q4_K_XL'.
      return !strictly || !part.hasSuffix("-ud-" + form)
    }
  }

  /// The model of a form.
  static func pick(
    _ form: String, from models: [GGUFModel], of repository: String
  ) throws(HubError) -> (GGUFModel, note: String?) {
    var fitting = models.filter { $0.isForm(form, strictly: true) }
    if fitting.isEmpty { fitting = models.filter { $0.isForm(form, strictly: false) } }
    guard let model = fitting.first else {
      throw HubError(
        .nothingToPull,
        models.isEmpty
          ? "\(repository) holds no GGUF files, so there is no '\(form)' to choose."
          : "\(repository) has no GGUF model in the form '\(form)'; it has \(list(models)).")
    }
    guard fitting.count == 1 else {
      throw HubError(
        .nothingToPull,
        "\(repository) has several GGUF models in the form '\(form)': \(list(fitting)). Pick one with '--include'.")
    }
    return (model, nil)
  }

  /// The only model, or the form that most people run.
  static func pickDefault(
    from models: [GGUFModel], of repository: String
  ) throws(HubError) -> (GGUFModel, note: String?) {
    if models.count == 1 { return (models[0], nil) }
    for form in ["Q4_K_M", "Q8_0", "Q4_0"] {
      let fitting = models.filter { $0.isForm(form, strictly: true) }
      guard fitting.count == 1 else { continue }
      return (
        fitting[0],
        "\(repository) holds \(models.count) GGUF models; \(form) is taken. '\(repository):FORM' takes another: \(list(models))."
      )
    }
    throw HubError(
      .nothingToPull,
      "\(repository) holds \(models.count) GGUF models; pick one with '\(repository):FORM' or '--include': \(list(models))."
    )
  }

  private static func list(_ models: [GGUFModel]) -> String {
    let names = models.prefix(40).map { printable($0.stem, limit: 120) }
    return names.joined(separator: ", ") + (models.count > 40 ? " and \(models.count - 40) more" : "")
  }
}
