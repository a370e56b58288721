public import ApusCore
public import ApusModels
import ApusScheduling
public import ApusTensors

/// K and V of all layers in pages of `kvPageSize` tokens. Which request owns which page is the scheduler's business.
public struct KVPool: Sendable {
  /// One pool of pages per layer; page p of a sequence is page p in every layer.
  public let layers: [any KVLayer]
  /// Pages of each layer.
  public let pageCount: Int
  /// How numbers are stored.
  public let dtype: DType

  /// Bytes of all layers.
  public var byteCount: Int { layers.reduce(0) { $0 + $1.byteCount } }

  /// Allocates pages.
  /// - Throws: `outOfMemory`; `unsupported` for latents of 8 bits.
  public init(
    layerCount: Int, pageCount: Int, layout: KVLayout, dtype: DType, backend: any Backend
  ) throws(EngineError) {
    var layers: [any KVLayer] = []
    for _ in 0..<layerCount {
      let layer: any KVLayer
      switch layout {
      case .heads(let count, let dimension):
        layer = try backend.makeKVLayer(
          pageCount: pageCount, kvHeads: count, headDimension: dimension, dtype: dtype)
      case .latent(let keyDimension, let valueDimension):
        layer = try backend.makeLatentLayer(
          pageCount: pageCount, keyDimension: keyDimension, valueDimension: valueDimension, dtype: dtype)
      }
      layers.append(layer)
    }
    self.layers = layers
    self.pageCount = pageCount
    self.dtype = dtype
  }

  /// Allocates pages of K/V heads.
  /// - Throws: `outOfMemory`.
  public init(
    layerCount: Int, pageCount: Int, kvHeads: Int, headDimension: Int, dtype: DType, backend: any Backend
  ) throws(EngineError) {
    try self.init(
      layerCount: layerCount, pageCount: pageCount, layout: .heads(kvHeads, dimension: headDimension), dtype: dtype,
      backend: backend)
  }

  /// Bytes that one page takes in all layers together.
  public static func bytesPerPage(layerCount: Int, layout: KVLayout, dtype: DType) -> Int {
    // Numbers of 8 bits have a float32 scale for each token and head.
    var scales = 0
    if dtype.byteCount == 1, case .heads(let count, _) = layout { scales = 2 * count }
    return kvPageSize * layerCount * (layout.numbers * dtype.byteCount + 4 * scales)
  }
}
