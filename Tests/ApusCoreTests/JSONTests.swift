import ApusCore
import Testing

@Suite struct JSONTests {
  private static let readable: [(String, JSONValue)] = [
    ("null", JSONValue.null), (" true ", true), ("-0", .int(0)), ("9223372036854775807", .int(.max)),
    ("-9223372036854775808", .int(.min)), ("9223372036854775808", .double(9_223_372_036_854_775_808)),
    ("1.5e3", .double(1500)), ("\"a\\u00e9\\ud83d\\ude00\\n\"", "aé😀\n"), ("[]", []), ("[1,[2]]", [1, [2]]),
    ("{\"b\":1,\"a\":{}}", ["b": 1, "a": [:]]),
  ]

  @Test(arguments: readable.indices)
  func reads(index: Int) throws {
    let (text, value) = Self.readable[index]
    #expect(try JSONValue.parse(text) == value)
  }

  @Test(arguments: [
    "", "nul", "01", "1.", ".5", "+1", "1e", "1e999", "\"", "\"\\x\"", "\"\\ud800\"", "\"\\ud800\\u0041\"",
    "\"\\udc00\"", "\"a\nb\"", "[1,]", "[1 2]", "{\"a\" 1}", "{\"a\":1,}", "{a:1}", "{} x", "'a'", "NaN", "[",
  ])
  func refuses(text: String) {
    #expect(throws: JSONError.self) { try JSONValue.parse(text) }
  }

  @Test func refusesInvalidUTF8AndDepth() {
    #expect(throws: JSONError.self) { try JSONValue.parse([0x22, 0xFF, 0x22]) }
    #expect(throws: JSONError.self) { try JSONValue.parse([0x22, 0xED, 0xA0, 0x80, 0x22]) }
    let deep = String(repeating: "[", count: 1_000_000)
    #expect(throws: JSONError.self) { try JSONValue.parse(deep) }
  }

  @Test func keepsKeyOrderAndTheLastValue() throws {
    let value = try JSONValue.parse("{\"z\":1,\"a\":2,\"z\":3}")
    #expect(value.compactText == "{\"z\":3,\"a\":2}")
  }

  /// Random trees survive being written and read.
  @Test func roundTrip() throws {
    var state: UInt64 = 0xC0FFEE
    func next(_ bound: Int) -> Int {
      state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
      return Int((state >> 33) % UInt64(bound))
    }
    func tree(_ depth: Int) -> JSONValue {
      switch next(depth > 3 ? 5 : 7) {
      case 0: return .null
      case 1: return .bool(next(2) == 0)
      case 2: return .int(Int64(next(1 << 30)) - (1 << 29))
      case 3: return .double(Double(next(1 << 30)) / 4096 + 0.5 / 4096)
      case 4:
        let scalars = (0..<next(8)).map { _ in Unicode.Scalar(UInt32(next(0xD7FF)))! }
        return .string(String(String.UnicodeScalarView(scalars)))
      case 5: return .array((0..<next(4)).map { _ in tree(depth + 1) })
      default: return .object(JSONObject((0..<next(4)).map { ("k\($0)", tree(depth + 1)) }))
      }
    }
    for round in 0..<2000 {
      let value = tree(0)
      let text = value.compactText
      #expect(try JSONValue.parse(text) == value, "seed 0xC0FFEE round \(round): \(text)")
    }
  }

  @Test func samplingParametersRefuseImpossibleValues() {
    func field(_ change: (inout SamplingParameters) -> Void) -> String? {
      var parameters = SamplingParameters()
      change(&parameters)
      do {
        try parameters.validate(vocabularySize: 10)
        return nil
      } catch {
        #expect(error.code == .invalidRequest)
        return error.parameter
      }
    }
    #expect(field { _ in } == nil)
    #expect(field { $0.temperature = -1 } == "temperature")
    #expect(field { $0.temperature = .nan } == "temperature")
    #expect(field { $0.topP = 0 } == "top_p")
    #expect(field { $0.topP = .nan } == "top_p")
    #expect(field { $0.topK = 0 } == "top_k")
    #expect(field { $0.minP = 1.5 } == "min_p")
    #expect(field { $0.repetitionPenalty = 0 } == "repetition_penalty")
    #expect(field { $0.frequencyPenalty = 3 } == "frequency_penalty")
    #expect(field { $0.presencePenalty = -3 } == "presence_penalty")
    #expect(field { $0.logitBias = [10: 1] } == "logit_bias")
    #expect(field { $0.logitBias = [1: 101] } == "logit_bias")
    #expect(field { $0.stopTokenIDs = [-1] } == "stop_token_ids")
    #expect(field { $0.maxNewTokens = -1 } == "max_new_tokens")
    #expect(field { $0.minNewTokens = 200 } == "min_new_tokens")
    #expect(field { $0.stop = [""] } == "stop")
    #expect(field { $0.stopRegex = [""] } == "stop_regex")
  }
}
