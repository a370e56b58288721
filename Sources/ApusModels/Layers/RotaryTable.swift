public import ApusCore
public import ApusTensors
import Glibc

/// Cosines and sines of every position up to the context length, filled in as sequences grow.
///
/// Memory is reserved for the whole context at once; the kernel provides pages only for rows that were filled, so a model
/// with a context of a million tokens starts as fast as a small one.
public final class RotaryTable: @unchecked Sendable {
  // Unchecked: only the thread that runs the model calls `prepare`, and it reads the table afterwards.

  /// float32 [contextLength, rotaryDimension]: cosines in the first half of a row, sines in the second.
  public let tensor: Tensor
  private let inverseFrequencies: [Float]
  private let factor: Float
  private var filled = 0

  /// Reserves the table.
  public init(
    _ configuration: RotaryConfiguration, contextLength: Int, maxPositionEmbeddings: Int, backend: any Backend
  ) throws(EngineError) {
    (inverseFrequencies, factor) = configuration.frequencies(
      contextLength: contextLength, maxPositionEmbeddings: maxPositionEmbeddings)
    tensor = try backend.allocate(
      rows: contextLength, columns: configuration.rotaryDimension, dtype: .float32)
  }

  /// Makes sure that the rows of positions 0..<count are filled.
  /// - Precondition: `count` is at most the context length.
  public func prepare(positions count: Int) {
    guard count > filled else { return }
    precondition(count <= tensor.rows, "Position \(count - 1) lies outside the context of \(tensor.rows) tokens.")
    // In blocks, so that a decoding sequence does not come here at each step.
    let end = min(tensor.rows, (count + 1023) / 1024 * 1024)
    let half = inverseFrequencies.count
    for position in filled..<end {
      let row = tensor.float32 + position * tensor.stride
      for pair in 0..<half {
        // In float32, as transformers has it: the product's rounding is part of what models were trained with.
        let angle = Float(position) * inverseFrequencies[pair]
        row[pair] = cosf(angle) * factor
        row[half + pair] = sinf(angle) * factor
      }
    }
    filled = end
  }
}
