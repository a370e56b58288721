import ApusCore
import ApusGrammar
import Testing

/// Objects and arrays against a check of the parsed value.
@Suite("JSON objects and arrays")
struct JSONStructureTests {
  @Test("Random objects against random constraints")
  func objects() throws {
    let seed = UInt64.random(in: 0..<1_000_000)
    print("JSONStructureTests.objects: seed \(seed)")
    var random = SeededGenerator(seed: seed)
    let names = ["a", "ab", "abc", "b", "\u{E9}", "x\"y", "xa", "n"]
    for round in 0..<100 {
      var object = ObjectExpression()
      var declared: [String] = []
      for name in names.shuffled(using: &random).prefix(random.below(6)) {
        declared.append(name)
        object.properties.append(
          .init(name, random.below(8) == 0 ? .never : .text("1"), isRequired: random.below(3) == 0))
      }
      let hasPattern = random.below(3) == 0
      if hasPattern { object.patternProperties = [.init(try .pattern("^x", search: true), .text("2"))] }
      let hasAdditional = random.below(2) == 0
      if hasAdditional { object.additional = .text("3") }
      if random.below(3) == 0 { object.minimumCount = random.below(4) }
      if random.below(3) == 0 { object.maximumCount = random.below(5) }
      let hasNames = random.below(4) == 0
      if hasNames { object.propertyNames = try .pattern("^[a-x\"]", search: true) }
      if random.below(3) == 0, declared.count > 2 {
        object.dependentRequired = [(declared[0], [declared[1]]), (declared[1], [declared[2]])]
      }
      object.order = random.below(2) == 0 ? .any : .declared
      func isValid(_ members: [(String, Int)]) -> Bool {
        let keys = members.map(\.0)
        if members.count < object.minimumCount || members.count > object.maximumCount ?? .max { return false }
        for (key, value) in members {
          if hasNames, let first = key.unicodeScalars.first?.value, !((0x61...0x78).contains(first) || first == 0x22) {
            return false
          }
          if let property = object.properties.first(where: { $0.name == key }) {
            if property.value == .never || value != 1 { return false }
          } else if hasPattern, key.hasPrefix("x") {
            if value != 2 { return false }
          } else if !hasAdditional || value != 3 {
            return false
          }
        }
        for property in object.properties where property.isRequired && !keys.contains(property.name) { return false }
        for (name, others) in object.dependentRequired where keys.contains(name) {
          for other in others where !keys.contains(other) { return false }
        }
        if object.order == .declared {
          let places = keys.map { key in declared.firstIndex(of: key) ?? 100 }
          if places != places.sorted() { return false }
        }
        return true
      }
      let compiled: CompiledGrammar
      do {
        compiled = try .of(Grammar(root: .object(object)), .of((0..<256).map { [UInt8($0)] }))
      } catch {
        // Then nothing may be valid.
        for _ in 0..<200 {
          let members = sample(names, &random)
          #expect(!isValid(members), "round \(round), seed \(seed): refused, but \(members) is valid for \(object)")
        }
        continue
      }
      var found = 0
      for _ in 0..<300 {
        let members = sample(names, &random)
        let text = write(members, &random)
        let expected = isValid(members)
        if expected { found += 1 }
        #expect(
          compiled.accepts(text) == expected,
          "round \(round), seed \(seed): \(text) must be \(expected ? "accepted" : "rejected") for \(object)")
      }
      // Whatever is begun can be completed.
      for _ in 0..<5 {
        let matcher = GrammarMatcher(compiled)
        var steps = 0
        while !matcher.isAccepting, steps < 400 {
          let mask = matcher.mask()
          let bytes = (0..<256).filter { mask[$0 >> 5] >> UInt32($0 & 31) & 1 != 0 }.map { UInt8($0) }
          if bytes.isEmpty { break }
          // Favour what ends things.
          let ends = bytes.filter { [0x7D, 0x22, 0x3A].contains($0) }
          let byte = (steps > 60 ? ends.last : nil) ?? bytes[random.below(bytes.count)]
          #expect(matcher.accept(byte: byte))
          steps += 1
        }
        #expect(matcher.isAccepting || steps == 400, "round \(round), seed \(seed): stuck for \(object)")
      }
    }
  }

  private func sample(_ names: [String], _ random: inout SeededGenerator) -> [(String, Int)] {
    let keys = names.shuffled(using: &random).prefix(random.below(6))
    return keys.map {
      ($0, random.below(4) == 0 ? 1 + random.below(3) : $0.hasPrefix("x") ? 2 : 1 + 2 * random.below(2))
    }
  }

  private func write(_ members: [(String, Int)], _ random: inout SeededGenerator) -> String {
    let isPretty = random.below(2) == 0
    func key(_ name: String) -> String {
      var text = "\""
      for scalar in name.unicodeScalars {
        if random.below(6) == 0 {
          let digits = String(scalar.value, radix: 16, uppercase: random.below(2) == 0)
          text += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
        } else if scalar == "\"" {
          text += "\\\""
        } else {
          text.unicodeScalars.append(scalar)
        }
      }
      return text + "\""
    }
    let parts = members.map { isPretty ? "\n  \(key($0)): \($1)" : "\(key($0)):\($1)" }
    return "{" + parts.joined(separator: ",") + (isPretty && !members.isEmpty ? "\n}" : "}")
  }

  @Test("A declared key cannot come twice")
  func duplicates() throws {
    let object = ObjectExpression([.init("a", .text("1")), .init("b", .text("1"))], additional: .text("3"))
    let grammar = try CompiledGrammar.of(Grammar(root: .object(object)))
    #expect(grammar.accepts(#"{"a":1,"b":1}"#) && grammar.accepts(#"{"b":1,"a":1}"#))
    #expect(
      !grammar.accepts(#"{"a":1,"a":1}"#) && !grammar.accepts(#"{"a":1,"\u0061":1}"#) && !grammar.accepts(#"{"a":3}"#))
  }

  @Test("Random arrays against random constraints")
  func arrays() throws {
    let seed = UInt64.random(in: 0..<1_000_000)
    print("JSONStructureTests.arrays: seed \(seed)")
    var random = SeededGenerator(seed: seed)
    for round in 0..<200 {
      var array = ArrayExpression(of: nil)
      for _ in 0..<random.below(3) {
        array.prefix.append(.init(.text("\(random.below(3))"), matching: random.below(3) == 0 ? .text("9") : .never))
      }
      if random.below(4) != 0 { array.items = .init(.text("1"), matching: random.below(2) == 0 ? .text("9") : .never) }
      if random.below(2) == 0 { array.minimumCount = random.below(4) }
      if random.below(2) == 0 { array.maximumCount = random.below(5) }
      if random.below(3) == 0 { array.minimumMatches = random.below(3) }
      if random.below(3) == 0 { array.maximumMatches = random.below(3) }
      func isValid(_ values: [Int]) -> Bool {
        if values.count < array.minimumCount || values.count > array.maximumCount ?? .max { return false }
        let matches = values.filter { $0 == 9 }.count
        if matches < array.minimumMatches || matches > array.maximumMatches ?? .max { return false }
        for (index, value) in values.enumerated() {
          guard let element = index < array.prefix.count ? array.prefix[index] : array.items else { return false }
          if element.plain != .text("\(value)"), element.matching != .text("\(value)") { return false }
        }
        return true
      }
      let compiled = try? CompiledGrammar.of(Grammar(root: .array(array)))
      for _ in 0..<200 {
        let values = (0..<random.below(6)).map { _ in [0, 1, 1, 2, 9, 9][random.below(6)] }
        let text = "[" + values.map { "\($0)" }.joined(separator: ", ") + "]"
        let expected = isValid(values)
        #expect(
          (compiled?.accepts(text) ?? false) == expected,
          "round \(round), seed \(seed): \(text), \(expected) for \(array)")
      }
    }
  }

  @Test("Large counts")
  func counts() throws {
    var array = ArrayExpression(of: .text("1"))
    array.minimumCount = 1000
    array.maximumCount = 100_000
    array.whitespace = .compact
    let grammar = try CompiledGrammar.of(Grammar(root: .array(array)))
    func text(_ count: Int) -> String { "[" + Array(repeating: "1", count: count).joined(separator: ",") + "]" }
    #expect(!grammar.accepts(text(999)) && grammar.accepts(text(1000)) && grammar.accepts(text(1001)))
  }

  @Test("White space by policy")
  func whitespace() throws {
    for (policy, accepted, rejected) in [
      (WhitespacePolicy.compact, [#"{"a":[1,1]}"#], [#"{"a": [1,1]}"#, #"{ "a":[1,1]}"#]),
      (.spaced, [#"{"a": [1, 1]}"#, #"{"a":[1,1]}"#], [#"{"a" :[1,1]}"#, #"{"a":  [1,1]}"#, #"{ "a":[1,1]}"#]),
      (.flexible(maximum: 4), ["{\n \"a\" : [ 1 ,\t1 ]\r\n}"], [#"{     "a":[1,1]}"#, #" {"a":[1,1]}"#]),
    ] as [(WhitespacePolicy, [String], [String])] {
      var array = ArrayExpression(of: .text("1"))
      array.whitespace = policy
      var object = ObjectExpression([.init("a", .array(array))])
      object.whitespace = policy
      let grammar = try CompiledGrammar.of(Grammar(root: .object(object)))
      for text in accepted { #expect(grammar.accepts(text), "\(policy): \(text)") }
      for text in rejected { #expect(!grammar.accepts(text), "\(policy): \(text)") }
    }
  }

  @Test("Any JSON object")
  func anyObject() throws {
    let grammar = try CompiledGrammar.of(.jsonObject)
    for text in [
      "{}", #"{"a": [1, -2.5e+3, true, null, {"b": "\u00e9\n\"x"}], "c": {}}"#, "{\n  \"k\": [\n    0.1\n  ]\n}",
    ] { #expect(grammar.accepts(text) == true, "\(text)") }
    for text in ["[]", "{", #"{"a"}"#, #"{"a": 01}"#, #"{"a": .5}"#, #"{"a": 1,}"#, "{'a': 1}", #"{"a": tru}"#] {
      #expect(!grammar.accepts(text), "\(text)")
    }
  }
}
