import ApusCore

/// What became of one tensor.
public struct TensorReport: Sendable {
  /// Its name in the checkpoint that was read.
  public var name: String
  public var shape: [Int]
  /// How it was stored, and how it is now.
  public var storedAs: String
  public var writtenAs: String
  /// Bytes in the output, scales included.
  public var byteCount: Int
  /// Root mean square of the errors over that of the numbers; 0 where every bit was kept.
  public var relativeError: Double
  /// The largest error of a single number.
  public var largestError: Double
}

/// What a conversion did.
public struct ConversionReport: Sendable {
  public var input: String
  public var output: String
  public var format: String
  /// Bytes of the files with weights.
  public var byteCount = 0
  public var tensors: [TensorReport] = []
  /// What the reader should know, in sentences.
  public var notes: [String] = []

  /// The root mean square error over that of the numbers, all tensors together.
  public private(set) var relativeError = 0.0
  private var squares = 0.0
  private var errorSquares = 0.0

  init(input: String, output: String, format: String) {
    self.input = input
    self.output = output
    self.format = format
  }

  mutating func add(_ tensor: TensorReport, squares: Double, errorSquares: Double) {
    tensors.append(tensor)
    self.squares += squares
    self.errorSquares += errorSquares
    relativeError = self.squares > 0 ? (self.errorSquares / self.squares).squareRoot() : 0
  }

  /// The tensors with the largest relative errors, worst first; none whose every bit was kept.
  public func worst(_ count: Int) -> [TensorReport] {
    Array(
      tensors.filter { $0.relativeError > 0 || $0.largestError > 0 }
        .sorted { ($1.relativeError, $0.name) < ($0.relativeError, $1.name) }.prefix(count))
  }

  /// The whole report as JSON.
  public var json: String {
    var writer = JSONWriter(capacity: 1 << 12)
    writer.object { writer in
      writer.member("input", input)
      writer.member("output", output)
      writer.member("format", format)
      writer.member("bytes", byteCount)
      writer.member("relative_rms_error", relativeError)
      writer.key("notes")
      writer.array { writer in for note in notes { writer.value(note) } }
      writer.key("tensors")
      writer.array { writer in
        for tensor in tensors {
          writer.object { writer in
            writer.member("name", tensor.name)
            writer.key("shape")
            writer.array { writer in for length in tensor.shape { writer.value(length) } }
            writer.member("stored_as", tensor.storedAs)
            writer.member("written_as", tensor.writtenAs)
            writer.member("bytes", tensor.byteCount)
            writer.member("relative_rms_error", tensor.relativeError)
            writer.member("max_abs_error", tensor.largestError)
          }
        }
      }
    }
    return writer.text
  }
}
