/// Memory of a backend: freed when its last reference goes. For the CPU backend it is host memory.
public final class DeviceMemory: @unchecked Sendable {
  // Unchecked: the engine's thread is the only writer after loading; the address itself never changes.

  /// The first byte, aligned to 64 bytes.
  public let address: UnsafeMutableRawPointer
  /// Size in bytes.
  public let byteCount: Int
  private let release: @Sendable (UnsafeMutableRawPointer, Int) -> Void

  /// Takes memory over; `release` is called once with address and size.
  public init(
    address: UnsafeMutableRawPointer, byteCount: Int,
    release: @escaping @Sendable (UnsafeMutableRawPointer, Int) -> Void
  ) {
    self.address = address
    self.byteCount = byteCount
    self.release = release
  }

  deinit { release(address, byteCount) }
}

/// A matrix or vector in a backend's memory: a handle, cheap to copy, that owns nothing but a reference.
///
/// Rows lie `stride` numbers apart; the numbers of a row are adjacent. A vector is a matrix of one row. Activations are
/// float32; weights have types of their own (`LinearWeight`, `EmbeddingTable`).
public struct Tensor: @unchecked Sendable {
  // Unchecked: see DeviceMemory.

  /// The memory that holds the numbers.
  public let memory: DeviceMemory
  /// Where the first number lies, in bytes from the start of the memory.
  public let byteOffset: Int
  public let dtype: DType
  public let rows: Int
  public let columns: Int
  /// Numbers between the starts of two rows.
  public let stride: Int

  /// Describes numbers in memory.
  public init(memory: DeviceMemory, byteOffset: Int = 0, dtype: DType, rows: Int, columns: Int, stride: Int? = nil) {
    let stride = stride ?? columns
    precondition(rows >= 0 && columns >= 0 && stride >= columns)
    precondition(
      rows == 0 || byteOffset + ((rows - 1) * stride + columns) * dtype.byteCount <= memory.byteCount,
      "The tensor lies outside its memory.")
    self.memory = memory
    self.byteOffset = byteOffset
    self.dtype = dtype
    self.rows = rows
    self.columns = columns
    self.stride = stride
  }

  /// The address of the first number.
  @inlinable public var pointer: UnsafeMutableRawPointer { memory.address + byteOffset }

  /// The address of the first number of a float32 tensor.
  @inlinable public var float32: UnsafeMutablePointer<Float> {
    precondition(dtype == .float32)
    return pointer.assumingMemoryBound(to: Float.self)
  }

  /// The first rows.
  public func prefix(rows count: Int) -> Tensor {
    precondition(count <= rows)
    return Tensor(memory: memory, byteOffset: byteOffset, dtype: dtype, rows: count, columns: columns, stride: stride)
  }

  /// A range of rows.
  public func rows(_ range: Range<Int>) -> Tensor {
    precondition(range.lowerBound >= 0 && range.upperBound <= rows)
    return Tensor(
      memory: memory, byteOffset: byteOffset + range.lowerBound * stride * dtype.byteCount, dtype: dtype,
      rows: range.count, columns: columns, stride: stride)
  }

  /// A range of columns; rows stay as far apart as they were.
  public func columns(_ range: Range<Int>) -> Tensor {
    precondition(range.lowerBound >= 0 && range.upperBound <= columns)
    return Tensor(
      memory: memory, byteOffset: byteOffset + range.lowerBound * dtype.byteCount, dtype: dtype, rows: rows,
      columns: range.count, stride: stride)
  }
}
