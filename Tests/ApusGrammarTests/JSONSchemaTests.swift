import ApusCore
import ApusGrammar
import Testing

@Suite("JSON Schema")
struct JSONSchemaTests {
  struct Case: CustomTestStringConvertible, Sendable {
    var schema: String
    var valid: [String]
    var invalid: [String]
    var testDescription: String { schema }

    init(_ schema: String, valid: [String], invalid: [String]) {
      self.schema = schema
      self.valid = valid
      self.invalid = invalid
    }
  }

  static let cases: [Case] = [
    Case("true", valid: ["null", "-0.5e-3", "[1,{}]", #"{"a":[[]]}"#], invalid: ["", "nul", "01", "[1,]", "{a:1}"]),
    // Numbers
    Case(
      #"{"type":"integer"}"#, valid: ["0", "-12", "1.0", "1e3", "2.00E+1"], invalid: ["1.5", "1e-1", "\"1\"", "-"]),
    Case(
      #"{"$schema":"http://json-schema.org/draft-04/schema#","type":"integer"}"#, valid: ["0", "-7"],
      invalid: ["1.0", "1e3"]),
    Case(
      #"{"minimum":0.1,"maximum":12.5,"type":"number"}"#,
      valid: ["0.1", "0.10", "1", "9.99", "12.5", "12.500", "12", "1e1", "1.25e1", "1E0", "2.5e-1"],
      invalid: ["0", "0.09", "0.0999", "12.51", "13", "100", "-1", "1.26e1", "1e2", "9e-2"]),
    Case(
      #"{"exclusiveMinimum":-3,"exclusiveMaximum":2,"type":"integer"}"#,
      valid: ["-2", "-1", "0", "-0", "1", "1.0", "1e0"],
      invalid: ["-3", "2", "-3.0", "10", "-10"]),
    Case(
      #"{"minimum":95,"maximum":1204,"type":"integer"}"#, valid: ["95", "99", "100", "999", "1000", "1204"],
      invalid: ["94", "9", "1205", "2000", "10000", "-100"]),
    Case(#"{"minimum":0,"type":"number"}"#, valid: ["0", "-0.0", "1e-300", "7e99"], invalid: ["-1", "-1e-9"]),
    Case(
      #"{"multipleOf":7,"type":"integer","minimum":10}"#, valid: ["14", "21", "700", "21.0"], invalid: ["7", "15", "0"]),
    Case(#"{"multipleOf":0.01}"#, valid: ["1", "0.5", "19.99", "19.990", "-3.14"], invalid: ["0.001", "19.995"]),
    Case(#"{"multipleOf":0.25}"#, valid: ["1", "0.5", "0.75", "12.250", "0"], invalid: ["0.1", "0.26", "0.3"]),
    Case(#"{"type":"integer","not":{"multipleOf":2}}"#, valid: ["1", "13"], invalid: ["2", "0", "10"]),
    Case(#"{"enum":[1,2.5,-10]}"#, valid: ["1", "1.0", "2.50", "-10", "2.5e0", "-1e1"], invalid: ["2", "10", "1.1"]),
    // Strings
    Case(
      #"{"type":"string","minLength":2,"maxLength":3}"#,
      valid: [#""ab""#, #""a\n\"""#, #""\u00e9\ud83d\ude00""#, "\"\u{1F600}é\""],
      invalid: [#""a""#, #""abcd""#, #""\u00e9""#]),
    Case(#"{"const":"a/b\n"}"#, valid: [#""a/b\n""#, #""a\/b\n""#, #""\u0061/b\u000A""#], invalid: [#""a/b""#]),
    Case(#"{"pattern":"^a+$","type":"string"}"#, valid: [#""aaa""#], invalid: [#""""#, #""ab""#]),
    Case(
      #"{"pattern":"b","type":"string","maxLength":3}"#, valid: [#""abc""#, #""b""#], invalid: [#""aaa""#, #""abcd""#]),
    Case(
      #"{"type":"string","not":{"enum":["a","b"]}}"#, valid: [#""c""#, #""""#, #""aa""#], invalid: [#""a""#, #""b""#]),
    Case(
      #"{"format":"date","type":"string"}"#, valid: [#""2024-02-29""#, #""1999-12-31""#],
      invalid: [#""2023-02-29""#, #""2024-2-1""#, #""2024-13-01""#]),
    Case(#"{"format":"no-such-format"}"#, valid: [#""x""#, "1"], invalid: []),
    // Arrays
    Case(
      #"{"type":"array","prefixItems":[{"type":"integer"},{"type":"string"}],"items":{"type":"boolean"}}"#,
      valid: ["[]", "[1]", #"[1,"a"]"#, #"[1,"a",true,false]"#], invalid: [#"["a"]"#, "[1,2]", #"[1,"a",1]"#]),
    Case(
      #"{"type":"array","contains":{"type":"integer","minimum":5},"maxContains":2}"#,
      valid: ["[5]", "[1,7,2]", "[9,9]"], invalid: ["[]", "[1]", "[5,6,7]"]),
    Case(
      #"{"type":"array","items":{"enum":["a","b","c"]},"uniqueItems":true,"minItems":1}"#,
      valid: [#"["a"]"#, #"["c","a","b"]"#, #"[ "a" , "\u0062" ]"#],
      invalid: ["[]", #"["a","a"]"#, #"["a","b","\u0061"]"#]),
    Case(
      #"{"type":"array","minItems":2,"maxItems":3}"#, valid: ["[1,2]", "[[],{},null]"], invalid: ["[1]", "[1,2,3,4]"]),
    // Objects
    Case(
      #"{"type":"object","properties":{"a":{"type":"integer"},"b":{}},"required":["b"],"additionalProperties":false}"#,
      valid: [#"{"b":1}"#, #"{"a":1,"b":[]}"#, #"{"b":0,"a":1}"#, #"{"\u0062":null}"#],
      invalid: ["{}", #"{"a":1}"#, #"{"b":1,"c":2}"#, #"{"b":1,"b":2}"#, #"{"a":"x","b":1}"#]),
    Case(
      #"{"type":"object","patternProperties":{"^a":{"type":"integer"},"z$":{"minimum":5}},"additionalProperties":{"type":"string"}}"#,
      valid: [#"{"a":1,"k":"v"}"#, #"{"az":7}"#, #"{"z":"s"}"#], invalid: [#"{"a":"x"}"#, #"{"az":1}"#, #"{"k":1}"#]),
    Case(
      #"{"type":"object","propertyNames":{"maxLength":2},"minProperties":1,"maxProperties":2}"#,
      valid: [#"{"a":1}"#, #"{"ab":1,"c":2}"#], invalid: ["{}", #"{"abc":1}"#, #"{"a":1,"b":2,"c":3}"#]),
    Case(
      #"{"type":"object","dependentRequired":{"a":["b","c"]}}"#, valid: ["{}", #"{"b":1}"#, #"{"c":1,"a":1,"b":1}"#],
      invalid: [#"{"a":1}"#, #"{"a":1,"b":1}"#]),
    Case(
      #"{"type":"object","dependentSchemas":{"a":{"properties":{"b":{"type":"integer"}},"required":["b"]}}}"#,
      valid: [#"{"b":"x"}"#, #"{"a":1,"b":2}"#], invalid: [#"{"a":1}"#, #"{"a":1,"b":"x"}"#]),
    // Combinations
    Case(
      #"{"allOf":[{"properties":{"a":{"type":["integer","string"]}}},{"properties":{"a":{"type":["string","null"]}},"required":["a"]}],"type":"object"}"#,
      valid: [#"{"a":"x"}"#], invalid: [#"{"a":1}"#, #"{"a":null}"#, "{}"]),
    Case(
      #"{"oneOf":[{"type":"integer"},{"type":"number","minimum":2}]}"#, valid: ["1", "2.5", "-1"],
      invalid: ["3", "1.5"]),
    Case(
      #"{"type":"object","oneOf":[{"required":["a"]},{"required":["b"]}]}"#, valid: [#"{"a":1}"#, #"{"b":1,"c":2}"#],
      invalid: ["{}", #"{"a":1,"b":2}"#]),
    Case(
      #"{"type":"object","properties":{"k":{"enum":["x","y"]}},"required":["k"],"if":{"properties":{"k":{"const":"x"}}},"then":{"required":["v"]},"else":{"properties":{"v":false}}}"#,
      valid: [#"{"k":"x","v":1}"#, #"{"k":"y"}"#], invalid: [#"{"k":"x"}"#, #"{"k":"y","v":1}"#]),
    Case(
      #"{"not":{"type":["object","array"]}}"#, valid: ["1", "null", #""x""#], invalid: ["{}", "[]"]),
    Case(
      #"{"type":"object","not":{"required":["a","b"]}}"#, valid: ["{}", #"{"a":1}"#, #"{"b":1,"c":1}"#],
      invalid: [#"{"a":1,"b":2}"#]),
    Case(
      #"{"enum":[{"a":[1,"x"]},null]}"#, valid: ["null", #"{ "a" : [ 1.0 , "x" ] }"#], invalid: [#"{"a":[1]}"#, "{}"]),
    // References
    Case(
      ##"{"$ref":"#/$defs/tree","$defs":{"tree":{"type":"object","properties":{"v":{"type":"integer"},"kids":{"type":"array","items":{"$ref":"#/$defs/tree"}}},"required":["v"],"additionalProperties":false}}}"##,
      valid: [#"{"v":1}"#, #"{"v":1,"kids":[{"v":2,"kids":[]},{"v":3}]}"#], invalid: ["{}", #"{"v":1,"kids":[{}]}"#]),
    // A branch that never ends is left out: only null satisfies this.
    Case(
      ##"{"anyOf":[{"type":"null"},{"type":"object","properties":{"a":{"$ref":"#/$defs/loop"}},"required":["a"]}],"$defs":{"loop":{"type":"array","items":{"$ref":"#/$defs/loop"},"minItems":1}}}"##,
      valid: ["null"], invalid: [#"{"a":[]}"#]),
    Case(
      ##"{"type":"object","properties":{"a/b":{"$ref":"#/$defs/x~1y"}},"$defs":{"x/y":{"type":"string"}}}"##,
      valid: [#"{"a/b":"s"}"#], invalid: [#"{"a/b":1}"#]),
    Case(
      ##"{"allOf":[{"properties":{"a":{}}}],"anyOf":[{"properties":{"b":{}},"required":["b"]},{"properties":{"c":{}},"required":["c"]}],"unevaluatedProperties":false,"type":"object"}"##,
      valid: [#"{"b":1}"#, #"{"a":1,"b":1,"c":1}"#], invalid: ["{}", #"{"b":1,"d":1}"#]),
  ]

  @Test("Small schemas accept and reject", arguments: cases)
  func accepts(_ test: Case) throws {
    let grammar = try JSONSchemaCompiler.compile(text: test.schema).grammar
    let accepts = try SchemaTesting.answers(grammar)
    for text in test.valid where !accepts(text) { Issue.record("\(text) is valid") }
    for text in test.invalid where accepts(text) { Issue.record("\(text) is invalid") }
  }

  @Test(
    "What cannot be enforced is refused with its place",
    arguments: [
      (#"{"properties":{"a":{"format":"regex"}}}"#, "/properties/a/format"),
      (#"{"type":"array","items":{"type":"string"},"uniqueItems":true}"#, "/uniqueItems"),
      (#"{"items":{"pattern":"(a)\\1"}}"#, "/items/pattern"),
      (#"{"properties":{"a/b":{"$ref":"other.json"}}}"#, "/properties/a~1b/$ref"),
      (#"{"$schema":"https://example.com/dialect"}"#, "/$schema"),
    ])
  func refusals(_ schema: String, _ pointer: String) throws {
    let error = try #require(throws: JSONSchemaError.self) { try JSONSchemaCompiler.compile(text: schema) }
    #expect(error.kind == .unsupported)
    #expect(error.pointer == pointer)
  }

  @Test(
    "Malformed schemas are refused",
    arguments: [
      (#"{"type":"strin"}"#, "/type"), (#"{"required":true}"#, "/required"), (#"{"properties":[]}"#, "/properties"),
      (#"{"minLength":-1}"#, "/minLength"), (#"{"multipleOf":0}"#, "/multipleOf"), (#"{"pattern":"("}"#, "/pattern"),
      (##"{"$ref":"#/$defs/none"}"##, "/$ref"), (##"{"$ref":"#"}"##, ""), (#"{"anyOf":[]}"#, "/anyOf"), ("12", ""),
      (#"{"type":"#, ""),
    ])
  func malformed(_ schema: String, _ pointer: String) throws {
    let error = try #require(throws: JSONSchemaError.self) { try JSONSchemaCompiler.compile(text: schema) }
    #expect(error.kind == .invalid)
    #expect(error.pointer == pointer)
  }

  @Test(
    "A schema without instances is found out",
    arguments: [
      "false", #"{"type":"string","enum":[1]}"#, #"{"type":"integer","minimum":0.2,"maximum":0.8}"#,
      ##"{"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]}"##, #"{"allOf":[{"const":1},{"const":2}]}"#,
      #"{"type":"object","minProperties":3,"properties":{"a":{}},"additionalProperties":false}"#,
      #"{"type":"string","pattern":"^a$","minLength":2}"#, #"{"type":"object","required":["a","b"],"maxProperties":1}"#,
    ])
  func unsatisfiable(_ schema: String) throws {
    let error = try #require(throws: JSONSchemaError.self) { try JSONSchemaCompiler.compile(text: schema) }
    #expect(error.kind == .unsatisfiable)
  }

  @Test("Relaxed compilation lists what it leaves out")
  func relaxed() throws {
    var options = JSONSchemaOptions()
    options.relaxed = true
    let schema = #"{"type":"array","items":{"type":"string","format":"regex"},"uniqueItems":true}"#
    let result = try JSONSchemaCompiler.compile(text: schema, options)
    #expect(result.relaxations.map(\.pointer).sorted() == ["/items/format", "/uniqueItems"])
    #expect(try SchemaTesting.accepts(result.grammar, #"["a","a"]"#))
    #expect(try !SchemaTesting.accepts(result.grammar, "[1]"))
  }

  @Test("A relaxed schema under not is left out as a whole, since leaving out its part would forbid more")
  func relaxedNegation() throws {
    var options = JSONSchemaOptions()
    options.relaxed = true
    let schema = #"{"type":"string","not":{"format":"regex","minLength":1}}"#
    let result = try JSONSchemaCompiler.compile(text: schema, options)
    #expect(!result.relaxations.isEmpty)
    #expect(try SchemaTesting.accepts(result.grammar, #""(""#))
  }

  @Test("Order, white space and number forms follow the options")
  func options() throws {
    var options = JSONSchemaOptions()
    options.order = .declared
    options.whitespace = .compact
    options.plainNumbers = true
    let schema = #"{"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"number","minimum":1}}}"#
    let grammar = try JSONSchemaCompiler.compile(text: schema, options).grammar
    #expect(try SchemaTesting.accepts(grammar, #"{"a":1,"b":2.5}"#))
    for text in [#"{"b":2.5,"a":1}"#, #"{"a": 1}"#, #"{"a":1.0}"#, #"{"a":1e2}"#, #"{"b":1e2}"#] {
      #expect(try !SchemaTesting.accepts(grammar, text), "\(text)")
    }
  }

  @Test("Formats are annotations when they are not asserted")
  func formats() throws {
    var options = JSONSchemaOptions()
    options.assertsFormats = false
    #expect(try SchemaTesting.accepts(#"{"format":"date"}"#, "x", options))
  }

  @Test("The strict subset is checked in OpenAI's words")
  func strict() throws {
    func reason(_ schema: String) -> String {
      do throws(JSONSchemaError) {
        _ = try JSONSchemaCompiler.compile(text: schema, .strictly)
        return ""
      } catch { return error.reason }
    }
    #expect(
      reason(#"{"type":"object","properties":{"a":{"type":"string"}},"required":["a"],"additionalProperties":false}"#)
        == "")
    #expect(
      reason(#"{"type":"object","properties":{"a":{"type":"string"}},"required":["a"]}"#)
        == "In context=(), 'additionalProperties' is required to be supplied and to be false")
    #expect(
      reason(#"{"type":"object","properties":{"a":{"type":"string"}},"additionalProperties":false}"#)
        == "In context=(), 'required' is required to be supplied and to be an array including every key in properties. "
        + "Missing 'a'")
    #expect(
      reason(
        #"{"type":"object","properties":{"a":{"type":"array"}},"required":["a"],"additionalProperties":false}"#)
        == "In context=('properties', 'a'), array schema missing items")
    #expect(
      reason(
        #"{"type":"object","properties":{"a":{"oneOf":[{"type":"null"}]}},"required":["a"],"additionalProperties":false}"#
      )
        == "In context=('properties', 'a'), 'oneOf' is not permitted")
    #expect(reason(#"{"type":"string"}"#).contains("got 'type: \"string\"'"))
  }

  @Test("Hostile schemas end in a result or an error, soon")
  func hostile() throws {
    var schemas: [String] = []
    // Products of alternatives.
    let pairs = (0..<40).map { #"{"anyOf":[{"required":["a\#($0)"]},{"required":["b\#($0)"]}]}"# }.joined(
      separator: ",")
    schemas.append(#"{"type":"object","allOf":[\#(pairs)]}"#)
    schemas.append(
      #"{"type":"object","oneOf":[\#((0..<60).map { #"{"properties":{"p\#($0)":{"type":"integer"}}}"# }.joined(separator: ","))]}"#
    )
    // Deep nesting, in the text and through references.
    schemas.append(String(repeating: #"{"not":"#, count: 400) + "{}" + String(repeating: "}", count: 400))
    schemas.append(String(repeating: #"{"items":"#, count: 200) + "{}" + String(repeating: "}", count: 200))
    let chain = (0..<2_000).map { ##""d\##($0)":{"allOf":[{"$ref":"#/$defs/d\##($0 + 1)"}]}"## }.joined(separator: ",")
    schemas.append(##"{"$ref":"#/$defs/d0","$defs":{\##(chain),"d2000":{}}}"##)
    // Patterns.
    schemas.append(#"{"type":"string","pattern":"^(a+)+$"}"#)
    schemas.append(
      #"{"allOf":[{"pattern":"^(.*a.{30})$"},{"pattern":"^(.*b.{31})$"},{"pattern":"(x+x+)+y"}],"type":"string"}"#)
    schemas.append(#"{"pattern":"\#(String(repeating: "(", count: 5_000))"}"#)
    schemas.append(#"{"pattern":"((a{1,1000}){1,1000}){1,1000}","type":"string"}"#)
    // Much data.
    let values = (0..<80_000).map { "\"value-\($0)\"" }.joined(separator: ",")
    schemas.append(#"{"enum":[\#(values)]}"#)
    schemas.append(#"{"not":{"enum":[\#(values)]}}"#)
    schemas.append(#"{"enum":[\#((0..<3_000).map { #"{"k":\#($0)}"# }.joined(separator: ","))]}"#)
    for schema in schemas {
      let clock = ContinuousClock()
      let start = clock.now
      do throws(JSONSchemaError) {
        _ = try JSONSchemaCompiler.compile(text: schema)
      } catch {
        #expect([.tooLarge, .invalid, .unsupported].contains(error.kind), "\(error)")
      }
      let time = clock.now - start
      #expect(time < .seconds(10), "\(schema.prefix(80)) took \(time)")
    }
  }
}

@Suite("Patterns of JSON Schema")
struct JSONSchemaPatternTests {
  @Test(
    "Searches and assertions",
    arguments: [
      ("abc", ["abc", "xxabcx"], ["ab", ""]), ("^abc$", ["abc"], ["xabc", "abcx"]), ("^a|b$", ["ax", "xb"], ["xax"]),
      ("a.c", ["abc"], ["a\nc", "ac"]), ("^[^\\d]+$", ["abc"], ["a1"]), ("^\\w{2,3}$", ["ab", "a_1"], ["é1", "abcd"]),
      ("^(?!foo)", ["bar", ""], ["foobar"]), ("^(?!.*\\/)^(.*[^.]+.*)$", ["ab", "a.b"], ["a/b", "..."]),
      ("^(?!pattern$).*$", ["patterns", "x", ""], ["pattern"]), ("foo(?=bar)", ["xfoobarx"], ["foobaz", "foo"]),
      ("(?<=a)b", ["ab", "xab"], ["b", "cb"]), ("(?<!a)b", ["b", "cb"], ["ab"]),
      ("\\bfoo\\b", ["foo", "a foo b"], ["afoo", "foob"]),
      ("^((?!foo).)*$", ["bar", "fo", ""], ["xfoox"]), ("^\\x41\\u0042\\u{43}$", ["ABC"], ["abc"]),
      ("^\\p{Lu}+$", ["ÀB"], ["a"]), ("^🐲*$", ["", "🐲🐲"], ["x"]),
      ("^\\S(|(.|\\n)*\\S)$", ["a", "a\nb"], ["a ", " a"]),
      ("^[\\w-.]+$", ["a-b.c"], ["a b"]), ("^a{,3}$", ["a{,3}"], ["aaa"]), ("^(a|b)?c*?$", ["ac", "", "ccc"], ["abc"]),
      ("^$", [""], ["x"]),
      ("^(https?://|/?.?-?(?!\\w+://)\\w).+\\.ya?ml$", ["http://x/a.yml", "a/b.yaml"], ["ftp://a.yml"]),
    ])
  func matches(_ pattern: String, _ matching: [String], _ others: [String]) throws {
    let schema = JSONValue.object(JSONObject([("pattern", .string(pattern)), ("type", "string")]))
    let grammar = try JSONSchemaCompiler.compile(schema).grammar
    let accepts = try SchemaTesting.answers(grammar)
    for text in matching where !accepts(JSONValue.string(text).compactText) { Issue.record("\(text) matches") }
    for text in others where accepts(JSONValue.string(text).compactText) { Issue.record("\(text) does not match") }
  }
}
