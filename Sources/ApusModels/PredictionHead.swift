public import ApusCore
public import ApusTensors
import Glibc

/// A few layers that draft for a target from what it computed itself: from a hidden state of a position p and the token at
/// p + 1, logits of the token at p + 2 and a hidden state that stands for the target's at p + 1. Such a head has K/V of its
/// own, at position p.
public protocol PredictionHead: Sendable {
  /// Widths of activations.
  var activationShape: ActivationShape { get }
  /// What the head remembers of a token.
  var kvLayout: KVLayout { get }
  /// Bytes of the head's packed weights.
  var weightBytes: Int { get }
  /// Numbers of a hidden state that it takes and gives.
  var hiddenSize: Int { get }
  /// Columns of its logits.
  var vocabularySize: Int { get }
  /// Which token each column of the logits is for; `nil` where columns are tokens.
  var tokenOfColumn: [TokenID]? { get }
  /// The target's layers whose inputs it needs to see, ascending. The number of layers stands for the last one's output.
  var capturedLayers: [Int] { get }

  /// The layers that a state must have for the head to find its own.
  func kvLayers(_ own: any KVLayer) -> [any KVLayer]
  /// Makes the table of rotations ready for positions 0..<count. Called before a pass that reaches so far.
  func prepare(positions count: Int)
  /// What the head takes for some rows of a pass that the target has finished.
  /// - Returns: float32 [count, hiddenSize], in the scratch memory.
  func hidden(
    of state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: HiddenScratch
  ) -> Tensor
  /// Runs the head over a pass that has begun.
  ///
  /// - Parameters:
  ///   - state: begun with the tokens at p + 1 and the positions p.
  ///   - hidden: float32 [rows, hiddenSize], the hidden states at p.
  ///   - joined: float32 [rows, 2 * hiddenSize], scratch.
  func run(_ state: ForwardState, hidden: Tensor, joined: Tensor)
  /// Computes logits of some rows of a finished pass.
  /// - Parameters:
  ///   - scratch: of `count` rows and `hiddenSize` columns.
  ///   - out: float32 [count, vocabularySize].
  /// - Returns: the hidden states that the next rows are to be made of, float32 [count, hiddenSize], in the scratch memory.
  @discardableResult
  func logits(
    _ state: ForwardState, rows: UnsafePointer<Int32>, count: Int, scratch: LogitScratch, out: Tensor
  ) -> Tensor
}

/// What some layers of a target get in a pass: the sum of the outputs of all before them.
public final class HiddenCapture: @unchecked Sendable {
  // Unchecked: owned by the thread that runs the model.

  /// The layers, ascending.
  public let layers: [Int]
  /// float32 [rows, layers * hidden]: one layer's numbers beside the other's.
  let numbers: Tensor
  private let width: Int

  /// Allocates for passes of `rows` rows.
  /// - Throws: `outOfMemory`.
  public init(layers: [Int], hiddenSize: Int, rows: Int, backend: any Backend) throws(EngineError) {
    self.layers = layers
    width = hiddenSize
    numbers = try backend.allocate(rows: rows, columns: layers.count * hiddenSize, dtype: .float32)
  }

  /// Keeps a layer's input, float32 [rows, hidden], if it is asked for.
  func take(layer: Int, _ input: Tensor) {
    for (place, wanted) in layers.enumerated() where wanted == layer {
      for row in 0..<input.rows {
        memcpy(
          numbers.float32 + row * numbers.stride + place * width, input.float32 + row * input.stride, 4 * width)
      }
    }
  }
}

/// Memory for the hidden states that a head takes from its target.
public struct HiddenScratch: Sendable {
  /// Of the target's width.
  let rows: LogitScratch
  /// [rows, captured layers * the target's hidden size], and what becomes of that: [rows, the head's hidden size].
  let captured: Tensor
  let fused: Tensor

  /// Allocates for `rows` rows.
  /// - Throws: `outOfMemory`.
  public init(
    rows count: Int, head: any PredictionHead, targetHiddenSize: Int, backend: any Backend
  ) throws(EngineError) {
    rows = try LogitScratch(rows: count, hiddenSize: targetHiddenSize, backend: backend)
    captured = try backend.allocate(
      rows: count, columns: max(1, head.capturedLayers.count) * targetHiddenSize, dtype: .float32)
    fused = try backend.allocate(rows: count, columns: head.hiddenSize, dtype: .float32)
  }
}
