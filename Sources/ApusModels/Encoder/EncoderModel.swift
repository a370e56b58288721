import ApusCommunication
public import ApusCore
public import ApusTensors
import Glibc

/// A bidirectional encoder that turns sequences into vectors, or judges them if it has a classifier: weights, and the
/// memory of one pass.
///
/// Sequences of a pass lie one behind the other, without padding, so that none is touched by the length of another.
public final class EncoderModel: @unchecked Sendable {
  // Unchecked: one thread at a time runs passes.

  public let configuration: EncoderConfiguration
  /// The longest sequence, in tokens.
  public let contextLength: Int
  /// The most tokens of a pass; at least the longest sequence.
  public let maxTokensPerPass: Int
  /// How a sequence's token vectors become one.
  public let pooling: EmbeddingInformation.Pooling
  /// Whether vectors are divided by their length.
  public let normalizes: Bool
  /// The format of the first layer's weights.
  public let weightFormat: WeightFormat
  /// Bytes of packed weights.
  public let weightBytes: Int

  private struct Norm {
    var weight: Tensor
    var bias: Tensor
  }

  private struct Dense {
    var weight: any LinearWeight
    var bias: Tensor
  }

  private struct Layer {
    var qkv: Dense
    var attentionOutput: Dense
    var attentionNorm: Norm
    var intermediate: Dense
    var output: Dense
    var outputNorm: Norm
  }

  /// The layers between the first token's vector and the labels.
  private struct Head {
    var dense: Dense
    var labels: Dense
  }

  private let backend: any EncoderBackend
  private let words: Tensor
  private let positions: Tensor
  private let tokenTypes: Tensor
  private let embeddingNorm: Norm
  private let layers: [Layer]
  private let head: Head?

  // A pass.
  private let hidden: Tensor
  private let delta: Tensor
  private let qkv: Tensor
  private let attended: Tensor
  private let wide: Tensor
  private let indices: UnsafeMutablePointer<Int32>
  private let rowStart: UnsafeMutablePointer<Int32>

  /// Rows for which the classifier is computed at once.
  private static let headRows = 64

  /// Loads a model's weights.
  ///
  /// - Parameters:
  ///   - contextLength: the longest sequence; `nil` for what `pooling` says, else all positions there are.
  ///   - progress: called with bytes read so far and in all.
  /// - Throws: `invalidCheckpoint` naming file, tensor and what was expected; `outOfMemory`; `invalidRequest` if the
  ///   context length is impossible.
  public init(
    _ configuration: EncoderConfiguration, pooling: PoolingConfiguration = PoolingConfiguration(),
    store: any WeightStore, backend: any EncoderBackend, options: WeightOptions = WeightOptions(),
    contextLength: Int? = nil, maxTokensPerPass: Int = 1024, progress: ((_ done: Int, _ total: Int) -> Void)? = nil
  ) throws(EngineError) {
    let limit = configuration.maximumContextLength
    let length = contextLength ?? min(pooling.maxSequenceLength ?? limit, limit)
    guard length >= 1, length <= limit else {
      throw EngineError(
        .invalidRequest,
        "The context length must be from 1 to \(limit), which is what the model's positions allow; "
          + "got \(length).", parameter: "context_length")
    }
    let (h, f) = (configuration.hiddenSize, configuration.intermediateSize)
    // A checkpoint of a class with a head has the encoder's name before the names of its weights.
    let prefix =
      ["", configuration.family == .bert ? "bert." : "roberta."].first {
        store.contains($0 + "embeddings.word_embeddings.weight")
      } ?? ""
    let loader = WeightLoader(
      store: store, backend: backend, options: options, layout: .single,
      sample: prefix + "encoder.layer.0.attention.self.query.weight",
      expectedBytes: configuration.parameterCount * 4, progress: progress)
    func norm(_ name: String) throws(EngineError) -> Norm {
      Norm(
        weight: try loader.norm(name, count: h), bias: try loader.bias([(name, h)], rank: 0, ranks: 1))
    }
    func dense(_ parts: [WeightLoader.Part], inputs: Int) throws(EngineError) -> Dense {
      Dense(
        weight: try loader.columnParallel(parts, inputs: inputs, rank: 0, ranks: 1),
        bias: try loader.bias(parts, rank: 0, ranks: 1))
    }
    /// Heads stay dense: they are computed once for each text, and what they lose goes straight into scores.
    func plain(_ part: WeightLoader.Part) throws(EngineError) -> Dense {
      Dense(
        weight: try loader.replicated(part, inputs: h), bias: try loader.bias([part], rank: 0, ranks: 1))
    }

    let embeddings = prefix + "embeddings."
    words = try loader.embedding(embeddings + "word_embeddings", rows: configuration.vocabularySize, columns: h)
    positions = try loader.embedding(
      embeddings + "position_embeddings", rows: configuration.maxPositionEmbeddings, columns: h)
    tokenTypes = try loader.embedding(
      embeddings + "token_type_embeddings", rows: configuration.tokenTypeCount, columns: h)
    embeddingNorm = try norm(embeddings + "LayerNorm")
    var layers: [Layer] = []
    for index in 0..<configuration.layerCount {
      let layer = "\(prefix)encoder.layer.\(index)."
      let attention = layer + "attention."
      layers.append(
        Layer(
          qkv: try dense(
            ["query", "key", "value"].map { (attention + "self." + $0, h) }, inputs: h),
          attentionOutput: try dense([(attention + "output.dense", h)], inputs: h),
          attentionNorm: try norm(attention + "output.LayerNorm"),
          intermediate: try dense([(layer + "intermediate.dense", f)], inputs: h),
          output: try dense([(layer + "output.dense", h)], inputs: f),
          outputNorm: try norm(layer + "output.LayerNorm")))
    }
    self.layers = layers
    if let labelCount = configuration.labelCount {
      head =
        switch configuration.family {
        case .bert:
          Head(dense: try plain((prefix + "pooler.dense", h)), labels: try plain(("classifier", labelCount)))
        case .roberta:
          Head(dense: try plain(("classifier.dense", h)), labels: try plain(("classifier.out_proj", labelCount)))
        }
    } else {
      head = nil
    }

    let rows = max(length, maxTokensPerPass)
    func make(_ columns: Int) throws(EngineError) -> Tensor {
      try backend.allocate(rows: rows, columns: columns, dtype: .float32)
    }
    hidden = try make(h)
    delta = try make(h)
    qkv = try make(3 * h)
    attended = try make(h)
    wide = try make(f)
    indices = .allocate(capacity: rows)
    rowStart = .allocate(capacity: rows + 1)
    self.configuration = configuration
    self.contextLength = length
    self.maxTokensPerPass = rows
    self.pooling = configuration.labelCount == nil ? pooling.pooling ?? .mean : .cls
    self.normalizes = configuration.labelCount == nil && pooling.normalizes
    self.backend = backend
    weightFormat = loader.firstFormat ?? .dense(loader.dtype)
    weightBytes = loader.packedBytes
  }

  deinit {
    indices.deallocate()
    rowStart.deallocate()
  }

  /// Computes the vectors of some sequences, or their labels' raw outputs, in one pass.
  ///
  /// - Precondition: every sequence has from 1 to `contextLength` tokens of the vocabulary; together they have at most
  ///   `maxTokensPerPass`.
  /// - Returns: for each sequence `hiddenSize` numbers, or `labelCount`.
  public func run(_ inputs: [EmbeddingInput]) -> [[Float]] {
    if inputs.isEmpty { return [] }
    var rows = 0
    for (index, input) in inputs.enumerated() {
      rowStart[index] = Int32(rows)
      rows += input.tokens.count
      precondition(!input.tokens.isEmpty && input.tokens.count <= contextLength && rows <= maxTokensPerPass)
    }
    rowStart[inputs.count] = Int32(rows)
    embed(inputs, rows: rows)
    for layer in layers { run(layer, rows: rows, sequences: inputs.count) }
    if let head { return classify(head, sequences: inputs.count) }
    return (0..<inputs.count).map { pool(Int(rowStart[$0])..<Int(rowStart[$0 + 1])) }
  }

  private func embed(_ inputs: [EmbeddingInput], rows: Int) {
    /// Adds up the rows of a table that a function chooses for each place of a sequence.
    func look(_ table: Tensor, into out: Tensor, _ row: (EmbeddingInput, Int) -> Int32) {
      var next = 0
      for input in inputs {
        for place in input.tokens.indices {
          indices[next] = row(input, place)
          next += 1
        }
      }
      backend.embed(table: table, tokens: indices, count: rows, out: out)
    }
    let (x, y) = (hidden.prefix(rows: rows), delta.prefix(rows: rows))
    let lastType = Int32(configuration.tokenTypeCount - 1)
    let firstPosition = configuration.firstPosition
    look(words, into: x) { $0.tokens[$1] }
    // A family without segments has a single type.
    look(tokenTypes, into: y) { $1 < $0.firstSegmentCount ?? .max ? 0 : min(1, lastType) }
    backend.add(x, y)
    look(positions, into: y) { Int32(firstPosition + $1) }
    backend.layerNorm(
      x, adding: y, weight: embeddingNorm.weight, bias: embeddingNorm.bias, epsilon: configuration.normEpsilon, out: x)
  }

  private func run(_ layer: Layer, rows: Int, sequences: Int) {
    let (x, y, h) = (hidden.prefix(rows: rows), delta.prefix(rows: rows), configuration.hiddenSize)
    let projected = qkv.prefix(rows: rows)
    let (attended, wide) = (attended.prefix(rows: rows), wide.prefix(rows: rows))
    func apply(_ dense: Dense, _ input: Tensor, _ output: Tensor) {
      backend.linear(input, dense.weight, bias: dense.bias, out: output)
    }
    func addAndNorm(_ norm: Norm) {
      backend.layerNorm(
        y, adding: x, weight: norm.weight, bias: norm.bias, epsilon: configuration.normEpsilon, out: x)
    }
    apply(layer.qkv, x, projected)
    backend.attendToAll(
      projected.columns(0..<h), projected.columns(h..<2 * h), projected.columns(2 * h..<3 * h), rowStart: rowStart,
      sequenceCount: sequences, heads: configuration.headCount, headDimension: configuration.headDimension,
      scale: 1 / Float(configuration.headDimension).squareRoot(), out: attended)
    apply(layer.attentionOutput, attended, y)
    addAndNorm(layer.attentionNorm)
    apply(layer.intermediate, x, wide)
    backend.activate(wide, configuration.activation)
    apply(layer.output, wide, y)
    addAndNorm(layer.outputNorm)
  }

  private func pool(_ rows: Range<Int>) -> [Float] {
    let columns = configuration.hiddenSize
    let vector: [Float] =
      switch pooling {
      case .cls: row(hidden, rows.lowerBound, columns)
      case .last: row(hidden, rows.upperBound - 1, columns)
      case .mean: mean(rows, columns)
      }
    return normalizes ? normalizedEmbedding(vector) : vector
  }

  private func row(_ tensor: Tensor, _ index: Int, _ columns: Int) -> [Float] {
    Array(UnsafeBufferPointer(start: tensor.float32 + index * tensor.stride, count: columns))
  }

  /// Sums in double precision, row after row.
  private func mean(_ rows: Range<Int>, _ columns: Int) -> [Float] {
    withUnsafeTemporaryAllocation(of: Double.self, capacity: columns) { sums in
      sums.initialize(repeating: 0)
      for row in rows {
        let numbers = hidden.float32 + row * hidden.stride
        for column in 0..<columns { sums[column] += Double(numbers[column]) }
      }
      return sums.map { Float($0 / Double(rows.count)) }
    }
  }

  private func classify(_ head: Head, sequences: Int) -> [[Float]] {
    var results: [[Float]] = []
    // The configuration has no more labels than the feed-forward layers are wide.
    let labelCount = head.labels.weight.outputs
    for begin in stride(from: 0, to: sequences, by: Self.headRows) {
      let count = min(Self.headRows, sequences - begin)
      // The layers' memory is free again: there are at least as many rows as sequences.
      let (first, dense) = (delta.prefix(rows: count), attended.prefix(rows: count))
      backend.gather(hidden, rows: rowStart + begin, count: count, out: first)
      backend.linear(first, head.dense.weight, bias: head.dense.bias, out: dense)
      for row in 0..<count {
        let numbers = dense.float32 + row * dense.stride
        for column in 0..<dense.columns { numbers[column] = tanhf(numbers[column]) }
      }
      let labels = wide.prefix(rows: count).columns(0..<labelCount)
      backend.linear(dense, head.labels.weight, bias: head.labels.bias, out: labels)
      for index in 0..<count { results.append(row(labels, index, labelCount)) }
    }
    return results
  }
}
