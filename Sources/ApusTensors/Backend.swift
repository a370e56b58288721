public import ApusCore

/// The storage format of a linear layer's weights inside a backend.
public enum WeightFormat: Sendable, Equatable {
  /// As numbers of this type: float32, float16 or bfloat16.
  case dense(DType)
  /// int8 with one scale per output row; activations are quantised to int8 per token on the fly (W8A8).
  case int8PerChannel
  /// As small integers in groups that share a scale; activations are quantised block by block on the fly.
  case codes(CodeLayout)

  /// A name for people, such as `bfloat16` or `int4`.
  public var name: String {
    switch self {
    case .dense(let dtype): dtype.name
    case .int8PerChannel: "int8"
    case .codes(let layout): layout.name
    }
  }
}

/// Where the numbers of a weight come from when it is packed: rows of a matrix [outputs, inputs], row-major, possibly at
/// an unaligned address inside a mapped file.
public struct WeightSource: @unchecked Sendable {
  // Unchecked: the memory is a read-only mapping that `owner` keeps alive.
  public var address: UnsafeRawPointer
  public var dtype: DType
  public var rows: Int
  public var columns: Int
  /// [rows]: what an integer of each row stands for, where `dtype` is int8. Such rows go into `int8PerChannel` alone, which
  /// keeps integers and scales as they are.
  public var scales: UnsafePointer<Float>?
  /// Keeps the memory alive.
  public var owner: AnyObject

  /// Describes a weight's source.
  public init(
    address: UnsafeRawPointer, dtype: DType, rows: Int, columns: Int, scales: UnsafePointer<Float>? = nil,
    owner: AnyObject
  ) {
    self.address = address
    self.dtype = dtype
    self.rows = rows
    self.columns = columns
    self.scales = scales
    self.owner = owner
  }
}

/// The weights of a linear layer [outputs, inputs] in the order in which the backend's inner loop reads them.
public protocol LinearWeight: AnyObject, Sendable {
  var outputs: Int { get }
  var inputs: Int { get }
  var format: WeightFormat { get }
  /// Bytes that one pass reads.
  var byteCount: Int { get }
}

/// One layer's K and V pages. The layout inside is the backend's own.
public protocol KVLayer: AnyObject, Sendable {
  var pageCount: Int { get }
  var kvHeads: Int { get }
  /// Numbers of a head's key.
  var headDimension: Int { get }
  /// Numbers of a head's value: those of its key, or fewer in latent pages.
  var valueDimension: Int { get }
  /// Whether the pages hold latents: one key for all query heads, whose first `valueDimension` numbers are its value.
  var isLatent: Bool { get }
  var dtype: DType { get }
  var byteCount: Int { get }
}

/// The sequences of a step as attention sees them. Pointers are valid for the duration of the call.
public struct AttentionBatch {
  /// Sequences in the batch.
  public var sequenceCount: Int
  /// [sequenceCount + 1]: first row in q of each sequence, and the total.
  public var rowStart: UnsafePointer<Int32>
  /// [sequenceCount]: position of each sequence's first row. Row i of a sequence is at position start + i and attends to
  /// positions 0...start + i (fewer with a sliding window).
  public var start: UnsafePointer<Int32>
  /// [sequenceCount]: first entry of each sequence's page table in `pages`.
  public var pageOffset: UnsafePointer<Int32>
  /// Page tables, flat.
  public var pages: UnsafePointer<Int32>

  /// Describes a batch.
  public init(
    sequenceCount: Int, rowStart: UnsafePointer<Int32>, start: UnsafePointer<Int32>,
    pageOffset: UnsafePointer<Int32>, pages: UnsafePointer<Int32>
  ) {
    self.sequenceCount = sequenceCount
    self.rowStart = rowStart
    self.start = start
    self.pageOffset = pageOffset
    self.pages = pages
  }
}

/// What is constant about a layer's attention.
public struct AttentionShape: Sendable {
  public var queryHeads: Int
  public var kvHeads: Int
  public var headDimension: Int
  /// Multiplies q . k.
  public var scale: Float
  /// A row attends to this many positions up to its own; 0 for all.
  public var slidingWindow: Int
  /// scores = cap * tanh(scores / cap); 0 for none.
  public var softCap: Float
  /// float32 [1, queryHeads]: attention sinks, a logit for each query head that takes part in the softmax beside the
  /// positions' scores (after scale and cap) and has no value; `nil` for none.
  public var sinks: Tensor?

  /// Describes attention.
  public init(
    queryHeads: Int, kvHeads: Int, headDimension: Int, scale: Float, slidingWindow: Int = 0, softCap: Float = 0,
    sinks: Tensor? = nil
  ) {
    self.queryHeads = queryHeads
    self.kvHeads = kvHeads
    self.headDimension = headDimension
    self.scale = scale
    self.slidingWindow = slidingWindow
    self.softCap = softCap
    self.sinks = sinks
  }
}

/// How one row of logits becomes a token. Steps in this order: penalties and bias, then (greedy) the largest logit with
/// ties to the smaller token id, or temperature, top-k, top-p, min-p and a draw.
public struct SamplingRow {
  public var temperature: Float = 1
  public var topK: Int32 = -1
  public var topP: Float = 1
  public var minP: Float = 0
  /// Uniform number in [0, 1) of the draw, already made from (seed, position).
  public var uniform: Float = 0

  /// The defaults.
  public init() {}
}

/// The operators that serving needs, over a device's memory. Calls are in order and, on the CPU, return when done.
///
/// Every operator that reduces over a row does so in an order that is a function of the row alone: neither the number of
/// rows, nor the other rows, nor the number of threads changes a bit of the result (DESIGN's first law).
public protocol Backend: AnyObject, Sendable {
  /// A name for people, such as "cpu (avx512-bf16, 2 threads)".
  var name: String { get }

  /// Zeroed memory for `rows` x `columns` numbers.
  /// - Throws: `outOfMemory`.
  func allocate(rows: Int, columns: Int, dtype: DType) throws(EngineError) -> Tensor

  /// Packs the rows of one or more sources, stacked in order, into one weight. All sources have equal `columns`.
  func packLinear(_ sources: [WeightSource], format: WeightFormat) throws(EngineError) -> any LinearWeight

  /// Packs matrices that are stored quantised, stacked in order, into one weight that keeps their codes. All have equal
  /// layout, `columns` and order of inputs.
  func packLinear(_ sources: [QuantizedSource]) throws(EngineError) -> any LinearWeight

  /// One weight whose outputs are those of some weights with equal inputs, one after the other; their formats may differ.
  func joinLinear(_ parts: [any LinearWeight]) -> any LinearWeight

  /// How far a packed weight of the format `int8PerChannel` is from the numbers it was made of: the root of the summed
  /// squared differences, divided by that of the numbers.
  func int8Error(_ weight: any LinearWeight, _ sources: [WeightSource]) -> Double

  /// One layer's K/V pages: float32, float16, bfloat16, or int8 or float8 with a scale for each token and head.
  func makeKVLayer(pageCount: Int, kvHeads: Int, headDimension: Int, dtype: DType) throws(EngineError) -> any KVLayer

  /// One layer's latent pages, as multi-head latent attention has them: for each token `keyDimension` numbers, the first
  /// `valueDimension` of which are the value too. float32, float16 or bfloat16.
  /// - Throws: `unsupported` for another type, `outOfMemory`.
  func makeLatentLayer(
    pageCount: Int, keyDimension: Int, valueDimension: Int, dtype: DType
  ) throws(EngineError) -> any KVLayer

  /// out[i] = table[tokens[i]]; `table` is row-major of any float type, `out` float32.
  func embed(table: Tensor, tokens: UnsafePointer<TokenID>, count: Int, out: Tensor)

  /// out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight, row by row. `x` may be `out`.
  func rmsNorm(_ x: Tensor, weight: Tensor, epsilon: Float, out: Tensor)

  /// residual += delta, then out = rmsNorm(residual).
  func addRMSNorm(residual: Tensor, delta: Tensor, weight: Tensor, epsilon: Float, out: Tensor)

  /// x += y.
  func add(_ x: Tensor, _ y: Tensor)

  /// out[r, n] = sum over k of x[r, k] * weight[n, k] (+ bias[n]). `x` and `out` are float32, rows may be strided.
  func linear(_ x: Tensor, _ weight: any LinearWeight, bias: Tensor?, out: Tensor)

  /// Normalises each head of each row over its `headDimension` numbers: q/k norm. `x` holds heads side by side.
  func headRMSNorm(_ x: Tensor, heads: Int, headDimension: Int, weight: Tensor, epsilon: Float)

  /// Rotates the first 2 * `table.columns / 2` numbers of each head in the half-split (NeoX) form, in place.
  /// `table` is float32 [positions, rotaryDimension]: cosines in the first half of a row, sines in the second.
  func rope(
    _ x: Tensor, heads: Int, headDimension: Int, positions: UnsafePointer<Int32>, table: Tensor)

  /// Rotates `table.columns` numbers of each head, which begin at number `offset` of it, in the interleaved form, in place:
  /// neighbours are a pair. `table` is that of `rope`.
  func ropeInterleaved(
    _ x: Tensor, heads: Int, headDimension: Int, offset: Int, positions: UnsafePointer<Int32>, table: Tensor)

  /// Writes the rows of `k` and `v` ([rows, kvHeads * headDimension]) to the slots given: slot = page * kvPageSize +
  /// position within the page.
  func writeKV(_ k: Tensor, _ v: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer)

  /// Writes the rows of `latents` ([rows, keyDimension]) to latent pages; slots as for `writeKV`.
  func writeLatents(_ latents: Tensor, slots: UnsafePointer<Int32>, layer: any KVLayer)

  /// Causal attention of q ([rows, queryHeads * headDimension]) over pages that already hold this step's K and V. `out` is
  /// [rows, queryHeads * valueDimension]. Over latent pages `shape.kvHeads` is 1.
  func attention(_ q: Tensor, layer: any KVLayer, batch: AttentionBatch, shape: AttentionShape, out: Tensor)

  /// out = silu(gateUp[:, ..<n]) * gateUp[:, n...], n = out.columns.
  func siluMul(_ gateUp: Tensor, out: Tensor)

  /// out[i] = x[rows[i]].
  func gather(_ x: Tensor, rows: UnsafePointer<Int32>, count: Int, out: Tensor)

  /// Copies the K/V of whole pages within a layer (used to relocate or duplicate pages).
  func copyPages(layer: any KVLayer, from: UnsafePointer<Int32>, to: UnsafePointer<Int32>, count: Int)

  /// logits[row, token] changes for the (token, count) pairs given: repetition where `seen`, then frequency * count and
  /// presence, then bias. All arrays have `count` entries.
  func applyPenalties(
    logits: Tensor, row: Int, tokens: UnsafePointer<TokenID>, outputCounts: UnsafePointer<Int32>, count: Int,
    repetition: Float, frequency: Float, presence: Float)

  /// logits[row, token] becomes negative infinity where bit `token % 32` of word `token / 32` is not set; tokens beyond the
  /// mask's words have no bit.
  func applyMask(logits: Tensor, row: Int, mask: UnsafePointer<UInt32>, words: Int)

  /// Draws one token for each row of `logits`. Rows are changed in the process.
  /// `tokens[i]` is -1 where a row holds no finite logit.
  func sample(logits: Tensor, rows: UnsafePointer<SamplingRow>, tokens: UnsafeMutablePointer<TokenID>)

  /// Log-probabilities (natural) of one row: log-sum-exp in float32 with a fixed order.
  func logSumExp(logits: Tensor, row: Int) -> Float

  /// The `k` largest entries of a row, largest first, ties to the smaller token id.
  func topK(
    logits: Tensor, row: Int, k: Int, tokens: UnsafeMutablePointer<TokenID>, values: UnsafeMutablePointer<Float>)
}
