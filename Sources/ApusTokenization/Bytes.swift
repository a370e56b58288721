import ApusCore

/// A borrowed stretch of UTF-8 (or raw) bytes, valid for the duration of a call.
typealias Bytes = UnsafeBufferPointer<UInt8>

/// Folds two words into one. The high and low halves of a 128-bit product depend on every bit of both.
@inline(__always)
func mixHash(_ left: UInt64, _ right: UInt64) -> UInt64 {
  let product = left.multipliedFullWidth(by: right)
  return product.high ^ product.low
}

/// Eight bytes from any address, little-endian.
@inline(__always)
func load64(_ pointer: UnsafePointer<UInt8>) -> UInt64 {
  UInt64(littleEndian: UnsafeRawPointer(pointer).loadUnaligned(as: UInt64.self))
}

/// Four bytes from any address, little-endian.
@inline(__always)
func load32(_ pointer: UnsafePointer<UInt8>) -> UInt32 {
  UInt32(littleEndian: UnsafeRawPointer(pointer).loadUnaligned(as: UInt32.self))
}

/// One to seven bytes as a little-endian word with zeros above.
@inline(__always)
func loadTail(_ pointer: UnsafePointer<UInt8>, _ count: Int) -> UInt64 {
  if count >= 4 {
    let low = UInt64(load32(pointer))
    let high = UInt64(load32(pointer + (count - 4)))
    return low | high << UInt64((count - 4) * 8)
  }
  var word: UInt64 = 0
  if count > 0 { word = UInt64(pointer[0]) }
  if count > 1 { word |= UInt64(pointer[1]) << 8 }
  if count > 2 { word |= UInt64(pointer[2]) << 16 }
  return word
}

/// A 64-bit hash of bytes, for the tables of this module. Not keyed: tables that take untrusted keys are bounded in size.
@inline(__always)
func hashBytes(_ pointer: UnsafePointer<UInt8>, _ count: Int) -> UInt64 {
  var hash = 0x9E37_79B9_7F4A_7C15 ^ UInt64(truncatingIfNeeded: count)
  var index = 0
  while index + 8 <= count {
    hash = mixHash(hash ^ load64(pointer + index), 0xA076_1D64_78BD_642F)
    index += 8
  }
  if index < count { hash = mixHash(hash ^ loadTail(pointer + index, count - index), 0xE703_7ED1_A0B4_28DB) }
  return mixHash(hash, 0x8EBC_6AF0_9C88_C6E3)
}

/// Whether two stretches of `count` bytes are equal.
@inline(__always)
func bytesEqual(_ left: UnsafePointer<UInt8>, _ right: UnsafePointer<UInt8>, _ count: Int) -> Bool {
  var index = 0
  while index + 8 <= count {
    if load64(left + index) != load64(right + index) { return false }
    index += 8
  }
  return index == count || loadTail(left + index, count - index) == loadTail(right + index, count - index)
}

/// The scalar that starts at `index` of well-formed UTF-8, and its length in bytes.
@inline(__always)
func decodeScalar(_ pointer: UnsafePointer<UInt8>, _ index: Int) -> (scalar: UInt32, length: Int) {
  let first = UInt32(pointer[index])
  if first < 0x80 { return (first, 1) }
  let second = UInt32(pointer[index + 1] & 0x3F)
  if first < 0xE0 { return ((first & 0x1F) << 6 | second, 2) }
  let third = UInt32(pointer[index + 2] & 0x3F)
  if first < 0xF0 { return ((first & 0x0F) << 12 | second << 6 | third, 3) }
  return ((first & 0x07) << 18 | second << 12 | third << 6 | UInt32(pointer[index + 3] & 0x3F), 4)
}

/// The number of bytes of the UTF-8 sequence that a lead byte opens.
@inline(__always)
func sequenceLength(_ lead: UInt8) -> Int {
  lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4
}

/// The index of the first byte of the scalar that ends before `index`.
@inline(__always)
func previousScalarStart(_ pointer: UnsafePointer<UInt8>, _ index: Int) -> Int {
  var start = index - 1
  while start > 0, pointer[start] & 0xC0 == 0x80 { start -= 1 }
  return start
}

/// Appends a scalar in UTF-8. The value must be a scalar: not a surrogate, at most U+10FFFF.
@inline(__always)
func appendScalar(_ scalar: UInt32, to bytes: inout [UInt8]) {
  if scalar < 0x80 {
    bytes.append(UInt8(scalar))
  } else if scalar < 0x800 {
    bytes.append(UInt8(0xC0 | scalar >> 6))
    bytes.append(UInt8(0x80 | scalar & 0x3F))
  } else if scalar < 0x10000 {
    bytes.append(UInt8(0xE0 | scalar >> 12))
    bytes.append(UInt8(0x80 | scalar >> 6 & 0x3F))
    bytes.append(UInt8(0x80 | scalar & 0x3F))
  } else {
    bytes.append(UInt8(0xF0 | scalar >> 18))
    bytes.append(UInt8(0x80 | scalar >> 12 & 0x3F))
    bytes.append(UInt8(0x80 | scalar >> 6 & 0x3F))
    bytes.append(UInt8(0x80 | scalar & 0x3F))
  }
}

/// How the bytes at `index` read as UTF-8.
enum UTF8Step {
  /// A well-formed sequence of this many bytes.
  case valid(Int)
  /// A maximal ill-formed part of this many bytes, for which one U+FFFD stands.
  case invalid(Int)
  /// The bytes end inside a sequence that more bytes could complete.
  case incomplete
}

/// Examines the sequence at `index` by the Unicode rules for maximal subparts (Unicode 3.9, U+FFFD substitution), which
/// Python's and Rust's lossy decoders follow too.
func utf8Step(_ bytes: Bytes, _ index: Int) -> UTF8Step {
  let first = bytes[index]
  if first < 0x80 { return .valid(1) }
  let length: Int
  var low: UInt8 = 0x80
  var high: UInt8 = 0xBF
  switch first {
  case 0xC2...0xDF: length = 2
  case 0xE0: (length, low) = (3, 0xA0)
  case 0xED: (length, high) = (3, 0x9F)
  case 0xE1...0xEF: length = 3
  case 0xF0: (length, low) = (4, 0x90)
  case 0xF1...0xF3: length = 4
  case 0xF4: (length, high) = (4, 0x8F)
  default: return .invalid(1)
  }
  for position in 1..<length {
    guard index + position < bytes.count else { return .incomplete }
    let byte = bytes[index + position]
    if byte < low || byte > high { return .invalid(position) }
    low = 0x80
    high = 0xBF
  }
  return .valid(length)
}

/// Whether bytes are well-formed UTF-8. ASCII is passed over eight bytes at a time.
func isValidUTF8(_ bytes: Bytes) -> Bool {
  guard let base = bytes.baseAddress else { return true }
  var index = 0
  while index < bytes.count {
    if index + 8 <= bytes.count, load64(base + index) & 0x8080_8080_8080_8080 == 0 {
      index += 8
      continue
    }
    guard case .valid(let length) = utf8Step(bytes, index) else { return false }
    index += length
  }
  return true
}

/// Copies bytes, writing U+FFFD for every maximal ill-formed part.
func repairedUTF8(_ bytes: Bytes) -> [UInt8] {
  var result: [UInt8] = []
  result.reserveCapacity(bytes.count)
  var index = 0
  while index < bytes.count {
    switch utf8Step(bytes, index) {
    case .valid(let length):
      for position in index..<(index + length) { result.append(bytes[position]) }
      index += length
    case .invalid(let length):
      result.append(contentsOf: [0xEF, 0xBF, 0xBD])
      index += length
    case .incomplete:
      result.append(contentsOf: [0xEF, 0xBF, 0xBD])
      index = bytes.count
    }
  }
  return result
}

extension Array where Element == UInt8 {
  /// Appends borrowed bytes.
  @inline(__always)
  mutating func append(bytes: Bytes) { append(contentsOf: bytes) }

  /// The bytes as text, ill-formed parts replaced.
  var text: String { String(decoding: self, as: UTF8.self) }
}
