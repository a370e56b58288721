import ApusConversion
import ApusCore
import ApusModels
import Testing

/// Blocks of GGUF files as they are written.
struct BlockQuantizationTests {
  static func bytes(hexadecimal text: String) -> [UInt8] {
    let digits = Array(text.utf8).map { $0 > 0x39 ? $0 - 0x57 : $0 - 0x30 }
    return stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
  }

  static func quantize(_ numbers: [Float], _ type: GGUFWeightType) -> [UInt8] {
    var blocks = [UInt8](repeating: 0xAA, count: numbers.count / type.blockLength * type.blockBytes)
    blocks.withUnsafeMutableBytes { type.quantize(numbers, count: numbers.count, to: $0.baseAddress!) }
    return blocks
  }

  static func dequantize(_ blocks: [UInt8], _ type: GGUFWeightType) -> [Float] {
    var numbers = [Float](repeating: .nan, count: blocks.count / type.blockBytes * type.blockLength)
    let count = numbers.count
    blocks.withUnsafeBytes { type.dequantize($0.baseAddress!, count: count, to: &numbers) }
    return numbers
  }

  /// Scripts/golden_gguf_quantize.py writes them with the gguf package.
  @Test func everyBitIsTheReferences() throws {
    let golden = try Paths.json(Paths.goldens + "/blocks.json")
    let data = Self.bytes(hexadecimal: golden["numbers"]!.stringValue!)
    let numbers = data.withUnsafeBytes { bytes in
      (0..<data.count / 4).map { bytes.loadUnaligned(fromByteOffset: 4 * $0, as: Float.self) }
    }
    let types = golden["blocks"]!.objectValue!
    #expect(types.count == 7)
    for (name, blocks) in types {
      let type = try #require(GGUFWeightType.writable.first { $0.name == name })
      let wanted = Self.bytes(hexadecimal: blocks.stringValue!)
      let found = Self.quantize(numbers, type)
      #expect(found.count == wanted.count)
      for block in 0..<wanted.count / type.blockBytes {
        let range = block * type.blockBytes..<(block + 1) * type.blockBytes
        #expect(Array(found[range]) == Array(wanted[range]), "\(name), block \(block)")
      }
    }
    #expect(Self.quantize(numbers, .f32) == data)
  }

  /// The relative error of random numbers; blocks of 256 must be better than those of 32 with as many bits.
  @Test func errorsAreThoseOfTheBits() {
    var generator = SeededGenerator(seed: 5)
    let numbers = (0..<256 * 64).map { _ in generator.normal() * 0.03 }
    func error(_ type: GGUFWeightType) -> Double {
      let found = Self.dequantize(Self.quantize(numbers, type), type)
      let squares = zip(numbers, found).reduce(0.0) { $0 + Double($1.0 - $1.1) * Double($1.0 - $1.1) }
      return (squares / numbers.reduce(0.0) { $0 + Double($1) * Double($1) }).squareRoot()
    }
    let errors = Dictionary(uniqueKeysWithValues: GGUFWeightType.writable.map { ($0, error($0)) })
    #expect(errors[.f32] == 0 && errors[.f16]! < 3e-4 && errors[.bf16]! < 3e-3 && errors[.q8_0]! < 0.006)
    #expect(errors[.q6_K]! < 0.02 && errors[.q5_K]! < 0.037 && errors[.q4_K]! < 0.075, "\(errors)")
    #expect(errors[.q5_K]! < errors[.q5_1]! && errors[.q4_K]! < errors[.q4_1]! && errors[.q4_1]! < errors[.q4_0]!)
  }

  /// What is representable comes back as it was, and rounding a second time changes nothing.
  @Test func representableNumbersStay() {
    var generator = SeededGenerator(seed: 6)
    let numbers = (0..<1024).map { _ in generator.normal() }
    for type in [GGUFWeightType.q8_0, .q4_0, .q5_0, .f16, .bf16] {
      let once = Self.dequantize(Self.quantize(numbers, type), type)
      let twice = Self.dequantize(Self.quantize(once, type), type)
      let largest = zip(once, twice).reduce(Float(0)) { max($0, abs($1.0 - $1.1)) }
      #expect(largest <= (type == .q8_0 ? 0.002 : 0.0005), "\(type.name)")
    }
    for type in GGUFWeightType.writable {
      let zeros = Self.dequantize(Self.quantize([Float](repeating: 0, count: 512), type), type)
      #expect(zeros.allSatisfy { $0 == 0 }, "\(type.name)")
    }
  }

  /// Any finite numbers, the largest and the smallest among them: never a trap.
  @Test func extremesNeverCrash() {
    var generator = SeededGenerator(seed: 7)
    let special: [Float] = [
      0, -0, Float.leastNonzeroMagnitude, -Float.leastNonzeroMagnitude, 1e-38, 3.4e38, -3.4e38, 1, -1, 65504, 65520,
      6e-8, 1e-20,
    ]
    for _ in 0..<200 {
      let numbers = (0..<256).map { _ -> Float in
        Bool.random(using: &generator)
          ? special.randomElement(using: &generator)!
          : generator.normal() * Float.random(in: 0...1, using: &generator)
      }
      for type in GGUFWeightType.writable { _ = Self.dequantize(Self.quantize(numbers, type), type) }
    }
  }
}
