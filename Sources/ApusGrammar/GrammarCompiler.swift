public import ApusCore

/// Compiles grammars for one vocabulary and keeps those that were asked for last. Safe to use from several threads.
public final class GrammarCompiler: @unchecked Sendable {
  /// The vocabulary.
  public let vocabulary: TokenVocabulary
  private let lock = GrammarLock()
  private let shared: MaskCache
  private let capacity: Int
  private var entries: [Key: Entry] = [:]
  private var clock: UInt64 = 0

  /// Bytes of a specification's text at most.
  public static let maximumTextBytes = 4 << 20

  private struct Key: Hashable {
    var specification: GrammarSpecification
    var whitespace: GrammarSpecification.Whitespace
  }

  private struct Entry {
    var result: Result<CompiledGrammar, EngineError>
    var used: UInt64
  }

  /// Makes a compiler.
  ///
  /// - Parameters:
  ///   - capacity: compiled grammars kept, failed ones included.
  ///   - maskBytes: room for masks that grammars share, beside what each keeps for itself (some 20 MB at most).
  public init(vocabulary: TokenVocabulary, capacity: Int = 128, maskBytes: Int = 64 << 20) {
    self.vocabulary = vocabulary
    self.capacity = max(1, capacity)
    shared = MaskCache(limit: maskBytes)
  }

  /// What is known of a specification without work: the compiled grammar, or why there is none; `nil` if it must be compiled.
  ///
  /// - Parameter whitespace: white space in JSON where the specification does not say.
  public func known(
    _ specification: GrammarSpecification, whitespace: GrammarSpecification.Whitespace = .flexible
  ) -> Result<CompiledGrammar, EngineError>? {
    let key = Key(specification: specification, whitespace: whitespace)
    return lock.withLock {
      clock += 1
      entries[key]?.used = clock
      return entries[key]?.result
    }
  }

  /// A compiled grammar, from the cache if it was asked for before.
  ///
  /// - Parameter whitespace: white space in JSON where the specification does not say.
  /// - Throws: `EngineError` with code `invalidRequest` if the specification is wrong, `unsupported` if it cannot be enforced
  ///   or is beyond a limit.
  public func compile(
    _ specification: GrammarSpecification, whitespace: GrammarSpecification.Whitespace = .flexible
  ) throws(EngineError) -> CompiledGrammar {
    if let known = known(specification, whitespace: whitespace) { return try known.get() }
    let result: Result<CompiledGrammar, EngineError>
    do throws(EngineError) {
      result = .success(try compile(Grammar(specification, whitespace: WhitespacePolicy(whitespace))))
    } catch {
      result = .failure(error)
    }
    lock.withLock {
      if entries.count >= capacity, let oldest = entries.min(by: { $0.value.used < $1.value.used }) {
        entries[oldest.key] = nil
      }
      entries[Key(specification: specification, whitespace: whitespace)] = Entry(result: result, used: clock)
    }
    return try result.get()
  }

  /// Compiles a grammar without keeping it.
  package func compile(_ grammar: Grammar) throws(EngineError) -> CompiledGrammar {
    let compiled = try CompiledGrammar(grammar, vocabulary: vocabulary, shared: shared)
    if compiled.warmUp() { return compiled }
    return try CompiledGrammar(grammar, vocabulary: vocabulary, shared: shared)
  }
}

extension Grammar {
  /// The grammar that a specification describes.
  ///
  /// - Parameter whitespace: white space in JSON where the specification does not say.
  package init(_ specification: GrammarSpecification, whitespace: WhitespacePolicy = .standard) throws(EngineError) {
    let size: Int =
      switch specification {
      case .jsonSchema(let text, _), .regex(let text), .ebnf(let text), .structuralTag(let text): text.utf8.count
      case .choices(let texts): texts.reduce(0) { $0 + $1.utf8.count }
      case .jsonObject: 0
      }
    if size > GrammarCompiler.maximumTextBytes {
      throw EngineError(
        .invalidRequest, "The grammar has \(size) bytes; at most \(GrammarCompiler.maximumTextBytes) are read")
    }
    switch specification {
    case .jsonSchema(let text, let options): self = try Self.schema(text, options, whitespace: whitespace)
    case .jsonObject:
      self.init()
      root = .rule(addJSONValue(whitespace: whitespace).object)
    case .regex(let pattern):
      self.init(root: .regular(try .pattern(pattern, search: false)))
    case .ebnf(let text): try self.init(ebnf: text)
    case .choices(let texts):
      if texts.isEmpty { throw EngineError(.invalidRequest, "A choice needs at least one text") }
      self.init(root: .regular(.anyOf(texts)))
    case .structuralTag(let text): try self.init(structuralTag: text, whitespace: whitespace)
    }
  }

  /// The grammar of a JSON Schema.
  package static func schema(
    _ text: String, _ options: GrammarSpecification.SchemaOptions = .init(), whitespace: WhitespacePolicy = .standard
  ) throws(EngineError) -> Grammar {
    var reading = options.isStrict ? JSONSchemaOptions.strictly : JSONSchemaOptions()
    reading.order = options.propertyOrder == .declared ? .declared : .any
    reading.whitespace = options.whitespace.map { WhitespacePolicy($0) } ?? whitespace
    reading.relaxed = options.isLenient
    reading.plainNumbers = options.plainNumbers || options.isStrict
    do throws(JSONSchemaError) {
      return try JSONSchemaCompiler.compile(text: text, reading).grammar
    } catch {
      throw error.engineError
    }
  }

  /// Adds the rules of JSON without a schema.
  package mutating func addJSONValue(whitespace: WhitespacePolicy) -> (value: RuleReference, object: RuleReference) {
    let value = addRule("value")
    var members = ObjectExpression([], additional: .rule(value))
    members.whitespace = whitespace
    var elements = ArrayExpression(of: .rule(value))
    elements.whitespace = whitespace
    let object = addRule("object", .object(members))
    define(
      value,
      .choice([
        .string(.anything), .regular(.jsonNumber), .text("true"), .text("false"), .text("null"), .rule(object),
        .array(elements),
      ]))
    return (value, object)
  }

  /// Takes over another grammar's rules.
  ///
  /// - Returns: its root, as an expression of this grammar.
  package mutating func absorb(_ other: Grammar) -> GrammarExpression {
    let offset = rules.count
    for rule in other.rules { rules.append(Rule(name: rule.name, body: Self.shifted(rule.body, by: offset))) }
    return Self.shifted(other.root, by: offset)
  }

  private static func shifted(_ expression: GrammarExpression, by offset: Int) -> GrammarExpression {
    if offset == 0 { return expression }
    switch expression {
    case .never, .empty, .literal, .characters, .regular, .special: return expression
    case .sequence(let parts): return .sequence(parts.map { shifted($0, by: offset) })
    case .choice(let parts): return .choice(parts.map { shifted($0, by: offset) })
    case .repetition(let part, let minimum, let maximum):
      return .repetition(shifted(part, by: offset), minimum: minimum, maximum: maximum)
    case .rule(let reference): return .rule(RuleReference(index: reference.index + offset))
    case .object(var object):
      for index in object.properties.indices {
        object.properties[index].value = shifted(object.properties[index].value, by: offset)
      }
      for index in object.patternProperties.indices {
        object.patternProperties[index].value = shifted(object.patternProperties[index].value, by: offset)
      }
      object.additional = object.additional.map { shifted($0, by: offset) }
      return .object(object)
    case .array(var array):
      func shift(_ element: ArrayExpression.Element) -> ArrayExpression.Element {
        ArrayExpression.Element(shifted(element.plain, by: offset), matching: shifted(element.matching, by: offset))
      }
      array.prefix = array.prefix.map(shift)
      array.items = array.items.map(shift)
      return .array(array)
    case .tags(var tags):
      for index in tags.tags.indices { tags.tags[index].content = shifted(tags.tags[index].content, by: offset) }
      return .tags(tags)
    }
  }
}

extension RegularExpression {
  /// A number as JSON writes it.
  package static let jsonNumber: RegularExpression = {
    let digits = RegularExpression.repetition(.scalars(ScalarRanges([0x30...0x39])), minimum: 0, maximum: nil)
    let someDigits = RegularExpression.repetition(.scalars(ScalarRanges([0x30...0x39])), minimum: 1, maximum: nil)
    func optional(_ part: RegularExpression) -> RegularExpression { .repetition(part, minimum: 0, maximum: 1) }
    return .concatenation([
      optional(.text("-")),
      .union([.text("0"), .concatenation([.scalars(ScalarRanges([0x31...0x39])), digits])]),
      optional(.concatenation([.text("."), someDigits])),
      optional(
        .concatenation([
          .scalars(ScalarRanges([0x45...0x45, 0x65...0x65])),
          optional(.scalars(ScalarRanges([0x2B...0x2B, 0x2D...0x2D]))), someDigits,
        ])),
    ])
  }()
}

extension JSONSchemaError {
  /// The same as an engine error.
  package var engineError: EngineError {
    EngineError(kind == .invalid ? .invalidRequest : .unsupported, "The JSON Schema cannot be enforced \(description)")
  }
}
