public import ApusCore
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
  /// - Throws: `outOfMemory`.
  public init(
    layerCount: Int, pageCount: Int, kvHeads: Int, headDimension: Int, dtype: DType, backend: any Backend
  ) throws(EngineError) {
    var layers: [any KVLayer] = []
    for _ in 0..<layerCount {
      layers.append(
        try backend.makeKVLayer(pageCount: pageCount, kvHeads: kvHeads, headDimension: headDimension, dtype: dtype))
    }
    self.layers = layers
    self.pageCount = pageCount
    self.dtype = dtype
  }

  /// Bytes that one page takes in all layers together.
  public static func bytesPerPage(layerCount: Int, kvHeads: Int, headDimension: Int, dtype: DType) -> Int {
    // Numbers of 8 bits have a float32 scale for each token and head.
    let scaleBytes = dtype.byteCount == 1 ? 4 : 0
    return 2 * kvPageSize * layerCount * kvHeads * (headDimension * dtype.byteCount + scaleBytes)
  }
}
