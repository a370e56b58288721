internal import CKernels
internal import Glibc

/// A function that is applied to each number between the two layers of a feed-forward block.
public enum ActivationFunction: Sendable, Equatable {
  /// x times the normal distribution's cumulative probability, through erf.
  case gelu
  /// Its approximation through tanh.
  case geluTanh
  case relu
  /// x / (1 + exp(-x)).
  case silu
}

/// The operators that bidirectional encoders need beside those of decoders. Like all operators they compute a row in an
/// order that is a function of the row (for attention: of its sequence) alone.
public protocol EncoderBackend: Backend {
  /// out = layer norm of x, or of x + y: (z - mean) / sqrt(variance + epsilon) * weight + bias, row by row, with the mean
  /// of squared differences as variance. `weight` and `bias` are float32 rows. `out` may be `x` or `y`.
  func layerNorm(_ x: Tensor, adding y: Tensor?, weight: Tensor, bias: Tensor, epsilon: Float, out: Tensor)

  /// Applies a function to each number, in place.
  func activate(_ x: Tensor, _ function: ActivationFunction)

  /// Attention of every row to all rows of its sequence. q, k and v are [rows, heads * headDimension] with equal strides;
  /// sequence i has the rows rowStart[i]..<rowStart[i + 1].
  func attendToAll(
    _ q: Tensor, _ k: Tensor, _ v: Tensor, rowStart: UnsafePointer<Int32>, sequenceCount: Int, heads: Int,
    headDimension: Int, scale: Float, out: Tensor)
}

extension CPUBackend: EncoderBackend {
  public func layerNorm(
    _ x: Tensor, adding y: Tensor?, weight: Tensor, bias: Tensor, epsilon: Float, out: Tensor
  ) {
    precondition(x.rows == out.rows && x.columns == out.columns)
    precondition(weight.columns >= x.columns && bias.columns >= x.columns)
    precondition(y.map { $0.rows == x.rows && $0.columns == x.columns } ?? true)
    locked {
      apus_layer_norm(
        $0, x.float32, Int64(x.stride), y.map { UnsafePointer($0.float32) }, Int64(y?.stride ?? 0), Int64(x.rows),
        Int64(x.columns), weight.float32, bias.float32, epsilon, out.float32, Int64(out.stride))
    }
  }

  public func activate(_ x: Tensor, _ function: ActivationFunction) {
    let kernel =
      switch function {
      case .gelu: APUS_GELU
      case .geluTanh: APUS_GELU_TANH
      case .relu: APUS_RELU
      case .silu: APUS_SILU
      }
    locked { apus_activate($0, x.float32, Int64(x.stride), Int64(x.rows), Int64(x.columns), kernel) }
  }

  public func attendToAll(
    _ q: Tensor, _ k: Tensor, _ v: Tensor, rowStart: UnsafePointer<Int32>, sequenceCount: Int, heads: Int,
    headDimension: Int, scale: Float, out: Tensor
  ) {
    let width = heads * headDimension
    precondition(q.stride == k.stride && k.stride == v.stride && out.columns == width)
    precondition(q.columns == width && k.columns == width && v.columns == width)
    precondition(Int(rowStart[sequenceCount]) <= min(q.rows, out.rows))
    locked {
      apus_attend_all(
        $0, q.float32, k.float32, v.float32, Int64(q.stride), rowStart, Int32(sequenceCount), Int32(heads),
        Int32(headDimension), scale, out.float32, Int64(out.stride))
    }
  }
}

extension ReferenceBackend: EncoderBackend {
  public func layerNorm(
    _ x: Tensor, adding y: Tensor?, weight: Tensor, bias: Tensor, epsilon: Float, out: Tensor
  ) {
    for row in 0..<x.rows {
      let numbers = (0..<x.columns).map { column in
        Double(x.float32[row * x.stride + column]) + (y.map { Double($0.float32[row * $0.stride + column]) } ?? 0)
      }
      let mean = numbers.reduce(0, +) / Double(x.columns)
      let variance = numbers.reduce(0) { $0 + ($1 - mean) * ($1 - mean) } / Double(x.columns)
      for (column, number) in numbers.enumerated() {
        let normed = (number - mean) / (variance + Double(epsilon)).squareRoot()
        out.float32[row * out.stride + column] =
          Float(normed * Double(weight.float32[column]) + Double(bias.float32[column]))
      }
    }
  }

  public func activate(_ x: Tensor, _ function: ActivationFunction) {
    for row in 0..<x.rows {
      for column in 0..<x.columns {
        let number = Double(x.float32[row * x.stride + column])
        let result =
          switch function {
          case .gelu: 0.5 * number * (1 + erf(number / 2.0.squareRoot()))
          case .geluTanh:
            0.5 * number * (1 + tanh((2 / Double.pi).squareRoot() * (number + 0.044715 * number * number * number)))
          case .relu: max(number, 0)
          case .silu: number / (1 + exp(-number))
          }
        x.float32[row * x.stride + column] = Float(result)
      }
    }
  }

  public func attendToAll(
    _ q: Tensor, _ k: Tensor, _ v: Tensor, rowStart: UnsafePointer<Int32>, sequenceCount: Int, heads: Int,
    headDimension: Int, scale: Float, out: Tensor
  ) {
    for sequence in 0..<sequenceCount {
      let rows = Int(rowStart[sequence])..<Int(rowStart[sequence + 1])
      for row in rows {
        for head in 0..<heads {
          let columns = head * headDimension..<(head + 1) * headDimension
          let scores = rows.map { other in
            columns.reduce(0.0) {
              $0 + Double(q.float32[row * q.stride + $1]) * Double(k.float32[other * k.stride + $1])
            } * Double(scale)
          }
          let greatest = scores.max() ?? 0
          let weights = scores.map { exp($0 - greatest) }
          let total = weights.reduce(0, +)
          for column in columns {
            let sum = zip(rows, weights).reduce(0.0) {
              $0 + $1.1 * Double(v.float32[$1.0 * v.stride + column])
            }
            out.float32[row * out.stride + column] = Float(sum / total)
          }
        }
      }
    }
  }
}
