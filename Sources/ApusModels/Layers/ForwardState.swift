public import ApusCore
public import ApusTensors

/// The rows of one forward pass: which tokens at which positions, and where their K and V go. Pointers must be valid for
/// the duration of the pass.
public struct ForwardBatch {
  /// Tokens in the batch.
  public var rowCount: Int
  /// [rowCount]: the tokens.
  public var tokens: UnsafePointer<TokenID>
  /// [rowCount]: position of each token in its sequence.
  public var positions: UnsafePointer<Int32>
  /// [rowCount]: where each token's K and V are written: page * kvPageSize + position within the page.
  public var slots: UnsafePointer<Int32>
  /// The sequences as attention sees them.
  public var attention: AttentionBatch
  /// [copyCount]: rows whose K and V are written to further places too, and these. A row may be listed several times.
  public var copyRows: UnsafePointer<Int32>?
  public var copySlots: UnsafePointer<Int32>?
  public var copyCount = 0

  /// Describes a pass.
  public init(
    rowCount: Int, tokens: UnsafePointer<TokenID>, positions: UnsafePointer<Int32>, slots: UnsafePointer<Int32>,
    attention: AttentionBatch
  ) {
    self.rowCount = rowCount
    self.tokens = tokens
    self.positions = positions
    self.slots = slots
    self.attention = attention
  }
}

/// Everything a batch carries from operation to operation: the arena of its activations and views of it.
///
/// Memory is allocated once, for the most rows a pass can have. Two states over one K/V pool let two half batches run
/// interleaved; nothing of a pass lives in the model itself.
public final class ForwardState: @unchecked Sendable {
  // Unchecked: owned by the thread that runs the model.

  /// The most rows of a pass.
  public let maxRows: Int
  /// K and V of each layer.
  public let kvLayers: [any KVLayer]
  /// The pass in progress.
  public private(set) var batch: ForwardBatch!

  /// Views of this pass's rows, all float32. Sizes are this rank's share.
  /// [rows, hidden]: the sum of all layers' outputs so far.
  public private(set) var residual: Tensor
  /// [rows, hidden]: the normalised input of a projection.
  public private(set) var normed: Tensor
  /// [rows, hidden]: what a half layer adds to the residual; not yet added.
  public private(set) var delta: Tensor
  /// [rows, (query heads + 2 * K/V heads) * head dimension] and its three parts.
  public private(set) var qkv: Tensor
  public private(set) var query: Tensor
  public private(set) var key: Tensor
  public private(set) var value: Tensor
  /// Where attention is over latents, what it has instead of `qkv` and its parts.
  public private(set) var latent: LatentActivations?
  /// [rows, query heads * head dimension]: attention's output. Over latents heads have the values' dimension.
  public private(set) var attended: Tensor
  /// [rows, 2 * intermediate]: gate and up projections side by side.
  public private(set) var gateUp: Tensor
  /// [rows, intermediate]: the activated product of the two.
  public private(set) var activated: Tensor

  /// Where layers have experts, what those need.
  public let experts: ExpertActivations?
  /// Measures the operations; `nil` for none.
  public var profile: OperationProfile?
  /// Keeps what layers get, for a drafting head; `nil` for none.
  public var capture: HiddenCapture?

  private let arena: [Tensor]
  private let latentArena: LatentActivations?
  private let queryWidth: Int
  private let keyWidth: Int

  /// Allocates the arena.
  /// - Throws: `outOfMemory`.
  public init(
    shape: ActivationShape, maxRows: Int, kvLayers: [any KVLayer], backend: any Backend
  ) throws(EngineError) {
    self.maxRows = maxRows
    self.kvLayers = kvLayers
    queryWidth = shape.queryWidth
    keyWidth = shape.keyWidth
    func make(_ columns: Int) throws(EngineError) -> Tensor {
      try backend.allocate(rows: maxRows, columns: columns, dtype: .float32)
    }
    residual = try make(shape.hidden)
    normed = try make(shape.hidden)
    delta = try make(shape.hidden)
    qkv = try make(shape.queryWidth + 2 * shape.keyWidth)
    attended = try make(shape.attendedWidth)
    gateUp = try make(2 * shape.intermediate)
    activated = try make(shape.intermediate)
    arena = [residual, normed, delta, qkv, attended, gateUp, activated]
    experts = try shape.experts.map { experts throws(EngineError) in
      try ExpertActivations(experts, rows: maxRows, backend: backend)
    }
    latentArena = try shape.latent.map { latent throws(EngineError) in
      try LatentActivations(latent, rows: maxRows, backend: backend)
    }
    query = qkv
    key = qkv
    value = qkv
  }

  /// Starts a pass: makes the views of its rows.
  /// - Precondition: the batch has at least one and at most `maxRows` rows.
  public func begin(_ batch: ForwardBatch) {
    precondition(batch.rowCount >= 1 && batch.rowCount <= maxRows, "A pass of \(batch.rowCount) rows does not fit.")
    let rows = batch.rowCount
    self.batch = batch
    experts?.recorder?.begin(batch)
    residual = arena[0].prefix(rows: rows)
    normed = arena[1].prefix(rows: rows)
    delta = arena[2].prefix(rows: rows)
    qkv = arena[3].prefix(rows: rows)
    attended = arena[4].prefix(rows: rows)
    gateUp = arena[5].prefix(rows: rows)
    activated = arena[6].prefix(rows: rows)
    latent = latentArena?.prefix(rows: rows)
    query = qkv.columns(0..<queryWidth)
    key = qkv.columns(queryWidth..<queryWidth + keyWidth)
    value = qkv.columns(queryWidth + keyWidth..<queryWidth + 2 * keyWidth)
  }
}

/// Widths of a rank's activations.
public struct ActivationShape: Sendable, Equatable {
  /// Numbers of a token between layers.
  public var hidden: Int
  /// This rank's query heads times the head dimension.
  public var queryWidth: Int
  /// This rank's K/V heads times the head dimension.
  public var keyWidth: Int
  /// This rank's share of the feed-forward width: the widest of dense layers and shared experts.
  public var intermediate: Int
  /// Where attention is over latents; the query and K/V widths are 0 then.
  public var latent: LatentShape?
  /// Where layers have experts.
  public var experts: ExpertShape?

  /// Width of attention's output.
  var attendedWidth: Int { latent.map { $0.heads * $0.sizes.valueDimension } ?? queryWidth }

  /// Bytes of the activations of one row.
  public var bytesPerRow: Int {
    4
      * (3 * hidden + queryWidth + 2 * keyWidth + attendedWidth + 3 * intermediate
        + (latent?.widths.reduce(0, +) ?? 0)) + (experts?.bytesPerRow ?? 0)
  }
}

/// Widths of a rank's activations in attention over latents.
public struct LatentShape: Sendable, Equatable {
  /// This rank's query heads.
  public var heads: Int
  public var sizes: LatentAttentionConfiguration

  /// Widths in the order of `LatentActivations`.
  fileprivate var widths: [Int] {
    [
      sizes.queryRank ?? 0, heads * sizes.headDimension, sizes.cacheDimension, heads * sizes.cacheDimension,
      heads * sizes.latentRank,
    ]
  }
}

/// What attention over latents carries from operation to operation, all float32.
public struct LatentActivations: Sendable {
  /// [rows, query rank]: what queries are made of; no columns where they are made of the hidden state.
  let compressedQuery: Tensor
  /// [rows, heads * (plain + rotated)].
  let query: Tensor
  /// [rows, latent rank + rotated]: what is cached.
  let latents: Tensor
  /// [rows, heads * (latent rank + rotated)].
  let absorbedQuery: Tensor
  /// [rows, heads * latent rank].
  let attended: Tensor

  fileprivate init(_ shape: LatentShape, rows: Int, backend: any Backend) throws(EngineError) {
    let widths = shape.widths
    func make(_ index: Int) throws(EngineError) -> Tensor {
      try backend.allocate(rows: rows, columns: widths[index], dtype: .float32)
    }
    compressedQuery = try make(0)
    query = try make(1)
    latents = try make(2)
    absorbedQuery = try make(3)
    attended = try make(4)
  }

  private init(_ whole: LatentActivations, rows: Int) {
    compressedQuery = whole.compressedQuery.prefix(rows: rows)
    query = whole.query.prefix(rows: rows)
    latents = whole.latents.prefix(rows: rows)
    absorbedQuery = whole.absorbedQuery.prefix(rows: rows)
    attended = whole.attended.prefix(rows: rows)
  }

  fileprivate func prefix(rows: Int) -> LatentActivations { LatentActivations(self, rows: rows) }
}
