import ApusCore

/// A grammar ready for matching: nodes of a pushdown automaton whose terminals are regular languages as large as possible.
final class GrammarProgram {
  enum Node {
    /// A regular language. `start` does not accept the empty text; `isNullable` says whether the language holds it.
    case terminal(start: RegularState, isNullable: Bool)
    case sequence([Int32])
    case choice([Int32])
    case repetition(Int32, minimum: Int32, maximum: Int32)
    case call(Int32)
    case object(Int32)
    case array(Int32)
    case tags(Int32)
  }

  let store = RegularStore()
  private(set) var nodes: [Node] = []
  private(set) var objects: [ObjectProgram] = []
  private(set) var arrays: [ArrayProgram] = []
  private(set) var tagPrograms: [TagsProgram] = []
  private(set) var root: Int32 = 0

  private let grammar: Grammar
  private let specialTexts: [String]
  private var productive: [Bool]
  private let nullable: [Bool]
  private enum RuleState { case unvisited, visiting(Int32), regular(RegularState), node(Int32) }
  private var ruleStates: [RuleState]
  private var depth = 0
  private static let maximumDepth = 1500
  static let maximumNodes = 1 << 20

  enum Lowered {
    case regular(RegularState)
    case node(Int32)

    var isNever: Bool { if case .regular(RegularStore.never) = self { true } else { false } }
  }

  /// - Throws: `EngineError` if nothing matches the grammar or it is beyond the limits.
  init(_ grammar: Grammar, specialTexts: [String]) throws(EngineError) {
    self.grammar = try LeftRecursion.removed(from: grammar)
    self.specialTexts = specialTexts
    nullable = Nullability.rules(of: self.grammar)
    productive = Array(repeating: false, count: self.grammar.rules.count)
    ruleStates = Array(repeating: .unvisited, count: self.grammar.rules.count)
    findProductive()
    let lowered = try lower(self.grammar.root)
    if lowered.isNever {
      try check()
      throw EngineError(.unsupported, "The grammar matches no text at all")
    }
    root = node(lowered)
    try check()
  }

  private func check() throws(EngineError) {
    if let overflow = store.overflow { throw EngineError(.unsupported, "The grammar is too large: \(overflow)") }
    if nodes.count > Self.maximumNodes {
      throw EngineError(.unsupported, "The grammar is too large: it needs more than \(Self.maximumNodes) nodes")
    }
  }

  // MARK: Productive rules

  private func findProductive() {
    var changed = true
    while changed {
      changed = false
      for index in grammar.rules.indices.reversed()
      where !productive[index] && isProductive(grammar.rules[index].body) {
        productive[index] = true
        changed = true
      }
    }
  }

  /// Whether an expression matches some text, as far as rules are known to.
  private func isProductive(_ expression: GrammarExpression) -> Bool {
    switch expression {
    case .never: return false
    case .empty, .literal, .special: return true
    case .characters(let set): return !set.isEmpty
    case .sequence(let parts): return parts.allSatisfy { isProductive($0) }
    case .choice(let parts): return parts.contains { isProductive($0) }
    case .repetition(let part, let minimum, _): return minimum == 0 || isProductive(part)
    case .rule(let reference): return productive[reference.index]
    case .regular(.never): return false
    case .regular: return true
    case .object(let object): return isProductive(object)
    case .array(let array): return ArrayProgram.isProductive(array) { isProductive($0) }
    case .tags(let tags):
      return (!tags.isRequired && tags.allowsText) || tags.tags.contains { isProductive($0.content) }
        || (!tags.isRequired && !tags.stopsAfterFirst)
    }
  }

  private func isProductive(_ object: ObjectExpression) -> Bool {
    if let maximum = object.maximumCount, maximum < object.minimumCount { return false }
    var possible = 0
    for property in object.properties {
      let value = isProductive(property.value)
      if property.isRequired, !value { return false }
      if value { possible += 1 }
    }
    let required = object.properties.filter(\.isRequired).count
    if let maximum = object.maximumCount, required > maximum { return false }
    if possible >= object.minimumCount { return true }
    if let additional = object.additional, isProductive(additional) { return true }
    return object.patternProperties.contains { isProductive($0.value) }
  }

  // MARK: Lowering

  private func add(_ node: Node) -> Int32 {
    nodes.append(node)
    return Int32(nodes.count - 1)
  }

  private func node(_ lowered: Lowered) -> Int32 {
    switch lowered {
    case .node(let node): node
    case .regular(let state): add(.terminal(start: store.nonEmpty(state), isNullable: store.accepts(state)))
    }
  }

  private func regular(_ state: RegularState) -> Lowered {
    .regular(store.isAlive(state) ? state : RegularStore.never)
  }

  private func lower(_ expression: GrammarExpression) throws(EngineError) -> Lowered {
    depth += 1
    defer { depth -= 1 }
    if depth > Self.maximumDepth {
      throw EngineError(.unsupported, "The grammar is nested more than \(Self.maximumDepth) deep")
    }
    switch expression {
    case .never: return .regular(RegularStore.never)
    case .empty: return .regular(RegularStore.empty)
    case .literal(let bytes): return .regular(store.literal(bytes))
    case .characters(let set): return .regular(store.scalars(set))
    case .regular(let expression): return regular(store.state(of: expression))
    case .special(let text):
      let plain = Array(text.utf8)
      return .regular(
        store.union(store.literal(plain), store.literal([TokenVocabulary.specialMarker] + plain)))
    case .sequence(let parts): return try sequence(parts)
    case .choice(let parts):
      var regulars: [RegularState] = []
      var others: [Int32] = []
      for part in parts {
        switch try lower(part) {
        case .regular(let state): regulars.append(state)
        case .node(let node): others.append(node)
        }
      }
      let union = store.union(regulars)
      if others.isEmpty { return .regular(union) }
      if union != RegularStore.never { others.append(node(.regular(union))) }
      return .node(others.count == 1 ? others[0] : add(.choice(others)))
    case .repetition(let part, let minimum, let maximum):
      if let maximum, maximum < minimum { return .regular(RegularStore.never) }
      let low = Int32(clamping: minimum)
      let high = maximum.map { Int32(clamping: $0) } ?? -1
      switch try lower(part) {
      case .regular(let state): return .regular(store.repetition(state, low, high))
      case .node(let child):
        if high == 0 { return .regular(RegularStore.empty) }
        return .node(
          add(.repetition(child, minimum: Nullability.isNullable(part, nullable) ? 0 : low, maximum: high)))
      }
    case .rule(let reference): return try lower(reference)
    case .object(let object):
      guard isProductive(object), let program = try ObjectProgram(object, self) else {
        return .regular(RegularStore.never)
      }
      objects.append(program)
      return .node(add(.object(Int32(objects.count - 1))))
    case .array(let array):
      guard let program = try ArrayProgram(array, self) else { return .regular(RegularStore.never) }
      arrays.append(program)
      return .node(add(.array(Int32(arrays.count - 1))))
    case .tags(let tags): return try lower(tags)
    }
  }

  private func lower(_ reference: RuleReference) throws(EngineError) -> Lowered {
    guard productive[reference.index] else { return .regular(RegularStore.never) }
    switch ruleStates[reference.index] {
    case .regular(let state): return .regular(state)
    case .node(let node), .visiting(let node): return .node(node)
    case .unvisited: break
    }
    let place = add(.choice([]))
    ruleStates[reference.index] = .visiting(place)
    switch try lower(grammar.rules[reference.index].body) {
    case .regular(let state) where !isReferenced(place):
      ruleStates[reference.index] = .regular(state)
      return .regular(state)
    case let lowered:
      nodes[Int(place)] = .call(node(lowered))
      ruleStates[reference.index] = .node(place)
      return .node(place)
    }
  }

  /// Whether nodes after a rule's place call it. A rule that came out regular cannot, unless what called it was dropped.
  private func isReferenced(_ place: Int32) -> Bool { nodes.count > Int(place) + 1 }

  private func sequence(_ parts: [GrammarExpression]) throws(EngineError) -> Lowered {
    var children: [Int32] = []
    var pending: [RegularState] = []
    for part in parts {
      switch try lower(part) {
      case .regular(let state):
        if state == RegularStore.never { return .regular(RegularStore.never) }
        pending.append(state)
      case .node(let node):
        if !pending.isEmpty {
          let state = store.concatenation(pending)
          if state != RegularStore.empty { children.append(self.node(.regular(state))) }
          pending = []
        }
        children.append(node)
      }
    }
    let rest = store.concatenation(pending)
    if children.isEmpty { return .regular(rest) }
    if rest != RegularStore.empty { children.append(node(.regular(rest))) }
    return .node(children.count == 1 ? children[0] : add(.sequence(children)))
  }

  /// The node of a value; `nil` if nothing matches it.
  func lowerValue(_ expression: GrammarExpression) throws(EngineError) -> Int32? {
    let lowered = try lower(expression)
    return lowered.isNever ? nil : node(lowered)
  }

  // MARK: Tagged text

  /// A text in which special tokens may stand for their texts.
  private func textWithSpecials(_ text: String) -> [GrammarExpression] {
    var result: [GrammarExpression] = []
    var plain: [UInt8] = []
    let bytes = Array(text.utf8)
    var index = 0
    outer: while index < bytes.count {
      for special in specialTexts where !special.isEmpty && bytes[index...].starts(with: special.utf8) {
        if !plain.isEmpty { result.append(.literal(plain)) }
        plain = []
        result.append(.special(special))
        index += special.utf8.count
        continue outer
      }
      plain.append(bytes[index])
      index += 1
    }
    if !plain.isEmpty { result.append(.literal(plain)) }
    return result
  }

  private func lower(_ tags: TagsExpression) throws(EngineError) -> Lowered {
    func region(_ tag: TagsExpression.Tag, dropping prefix: Int) -> GrammarExpression {
      let rest = String(decoding: Array(tag.begin.utf8).dropFirst(prefix), as: UTF8.self)
      return .sequence(textWithSpecials(rest) + [tag.content] + textWithSpecials(tag.end))
    }
    if !tags.allowsText {
      let one = GrammarExpression.choice(tags.tags.map { region($0, dropping: 0) })
      if tags.stopsAfterFirst { return try lower(tags.isRequired ? one : .choice([.empty, one])) }
      let more = GrammarExpression.repetition(
        .sequence(textWithSpecials(tags.separator) + [one]), minimum: 0, maximum: nil)
      let some = GrammarExpression.sequence([one, more])
      return try lower(tags.isRequired ? some : .choice([.empty, some]))
    }
    var program = TagsProgram(stopsAfterFirst: tags.stopsAfterFirst)
    var texts: [(bytes: [UInt8], tag: Int32)] = []
    for (index, trigger) in tags.triggers.enumerated() {
      if trigger.isEmpty { throw EngineError(.invalidRequest, "A trigger of a structural tag is empty") }
      let matching = tags.tags.filter { $0.begin.utf8.starts(with: trigger.utf8) }
      var children: [Int32] = []
      for tag in matching {
        if let node = try lowerValue(region(tag, dropping: trigger.utf8.count)) { children.append(node) }
      }
      if matching.isEmpty {
        throw EngineError(.invalidRequest, "No structure of the structural tag begins with its trigger '\(trigger)'")
      }
      program.regions.append(children.isEmpty ? -1 : children.count == 1 ? children[0] : add(.choice(children)))
      guard !children.isEmpty else { continue }
      let plain = Array(trigger.utf8)
      texts.append((plain, Int32(index)))
      // The same with special tokens in their marked form.
      var marked: [UInt8] = []
      for part in textWithSpecials(trigger) {
        switch part {
        case .literal(let bytes): marked += bytes
        case .special(let text): marked += [TokenVocabulary.specialMarker] + Array(text.utf8)
        default: break
        }
      }
      if marked != plain { texts.append((marked, Int32(index))) }
    }
    for tag in tags.tags where !tags.triggers.contains(where: { tag.begin.utf8.starts(with: $0.utf8) }) {
      throw EngineError(
        .invalidRequest, "The begin '\(tag.begin)' of a structural tag starts with none of its triggers")
    }
    if texts.isEmpty, tags.isRequired { return .regular(RegularStore.never) }
    let before = store.addSearch(TextSearch(texts, permitsEnd: !tags.isRequired))
    let after = store.addSearch(TextSearch(texts, permitsEnd: true))
    program.textBefore = store.search(before)
    program.textAfter = store.search(after)
    program.isRequired = tags.isRequired
    tagPrograms.append(program)
    return .node(add(.tags(Int32(tagPrograms.count - 1))))
  }
}

/// Free text with regions.
struct TagsProgram {
  /// Free text up to the first trigger, and between regions.
  var textBefore: RegularState = 0
  var textAfter: RegularState = 0
  /// What follows each trigger; -1 if nothing does.
  var regions: [Int32] = []
  var isRequired = false
  let stopsAfterFirst: Bool

  init(stopsAfterFirst: Bool) { self.stopsAfterFirst = stopsAfterFirst }
}

/// The white space of a policy.
struct WhitespaceStates {
  /// After an opening bracket and before a closing one, a comma or a colon.
  let around: RegularState
  /// After a comma or a colon.
  let after: RegularState

  init(_ policy: WhitespacePolicy, _ store: RegularStore) {
    switch policy {
    case .compact:
      around = RegularStore.empty
      after = RegularStore.empty
    case .spaced:
      around = RegularStore.empty
      after = store.repetition(store.byte(0x20), 0, 1)
    case .fixed:
      around = RegularStore.empty
      after = store.byte(0x20)
    case .flexible(let maximum):
      let white = store.scalars(ScalarRanges([0x09...0x0A, 0x0D...0x0D, 0x20...0x20]))
      around = store.repetition(white, 0, Int32(clamping: maximum))
      after = around
    }
  }
}

/// Tags of what ends a terminal of an object or array, beside the numbers of properties and patterns.
enum MemberTag {
  static let close: Int32 = 1 << 24
  static let item: Int32 = 1 << 24 | 1
  static let additional: Int32 = 1 << 24 | 2
  /// The first pattern; the others follow.
  static let patterns: Int32 = 1 << 25
}

/// An object: its members and what decides which may come next.
struct ObjectProgram {
  /// What an object under way has.
  struct State: Hashable {
    /// Properties that occurred, a bit each.
    var seen: [UInt64]
    /// Members so far, no further than it matters.
    var count: Int32 = 0
    /// In declared order: the place of the last property, `Int32.max` once others began.
    var last: Int32 = -1
  }

  /// What may come next.
  struct Choices {
    var names: [UInt64]
    var anyName = false
    var others = false
    var close = false
  }

  /// Properties that can occur, by rank of their names.
  let count: Int
  let values: [Int32]
  /// Place of each in declared order.
  let places: [Int32]
  let required: [UInt64]
  /// What each property requires, itself left out; empty if nothing requires anything.
  let implied: [[UInt64]]
  let trie: Int32
  let patterns: [(keys: RegularState, value: Int32)]
  let additional: (keys: RegularState, value: Int32)?
  let minimum: Int32
  let maximum: Int32
  let isOrdered: Bool
  let colon: RegularState
  let whitespace: WhitespaceStates
  let initial: State
  private let words: Int
  private let countLimit: Int32

  /// `nil` if no object matches.
  init?(_ object: ObjectExpression, _ program: GrammarProgram) throws(EngineError) {
    let store = program.store
    var names = Set<String>()
    for property in object.properties where !names.insert(property.name).inserted {
      throw EngineError(.invalidRequest, "An object declares the property '\(property.name)' twice")
    }
    let permitted: RegularState? = object.propertyNames.map { store.state(of: $0) }
    func isPermitted(_ name: String) -> Bool {
      guard var state = permitted else { return true }
      for byte in name.utf8 { state = store.derivative(state, byte) }
      return store.accepts(state)
    }
    var viable: [(bytes: [UInt8], name: String, value: Int32, place: Int32, isRequired: Bool)] = []
    for (place, property) in object.properties.enumerated() {
      guard isPermitted(property.name), let value = try program.lowerValue(property.value) else {
        if property.isRequired { return nil }
        continue
      }
      viable.append((Array(property.name.utf8), property.name, value, Int32(place), property.isRequired))
    }
    // What a property requires, to the end; one that requires the impossible is impossible.
    var requirements: [String: Set<String>] = [:]
    for (name, others) in object.dependentRequired { requirements[name, default: []].formUnion(others) }
    if !requirements.isEmpty {
      var changed = true
      while changed {
        changed = false
        let present = Set(viable.map(\.name))
        for (name, others) in requirements where present.contains(name) && !others.isSubset(of: present) {
          if viable.contains(where: { $0.name == name && $0.isRequired }) { return nil }
          viable.removeAll { $0.name == name }
          changed = true
        }
      }
    }
    viable.sort { $0.bytes.lexicographicallyPrecedes($1.bytes) }
    count = viable.count
    words = (viable.count + 63) / 64
    values = viable.map(\.value)
    places = viable.map(\.place)
    var required = [UInt64](repeating: 0, count: words)
    for (rank, property) in viable.enumerated() where property.isRequired {
      required[rank >> 6] |= 1 << UInt64(rank & 63)
    }
    var implied: [[UInt64]] = []
    if !requirements.isEmpty {
      let ranks = Dictionary(uniqueKeysWithValues: viable.enumerated().map { ($1.name, $0) })
      for property in viable {
        var set = [UInt64](repeating: 0, count: words)
        var pending = Array(requirements[property.name] ?? [])
        while let name = pending.popLast() {
          guard let rank = ranks[name], set[rank >> 6] >> UInt64(rank & 63) & 1 == 0 else { continue }
          set[rank >> 6] |= 1 << UInt64(rank & 63)
          pending += requirements[name] ?? []
        }
        implied.append(set)
      }
      for rank in viable.indices where viable[rank].isRequired {
        for word in 0..<words { required[word] |= implied[rank][word] }
      }
    }
    self.required = required
    self.implied = implied
    trie = store.addTrie(KeyTrie(viable.map(\.bytes)))
    let declared = store.tree(of: object.properties.map { Array($0.name.utf8) })
    var excluded: [RegularState] = declared == RegularStore.never ? [] : [store.complement(declared)]
    var patterns: [(keys: RegularState, value: Int32)] = []
    for pattern in object.patternProperties {
      let language = store.state(of: pattern.keys)
      let keys = store.intersection([language] + excluded + (permitted.map { [$0] } ?? []))
      excluded.append(store.complement(language))
      guard store.isAlive(keys), let value = try program.lowerValue(pattern.value) else { continue }
      patterns.append((keys, value))
    }
    self.patterns = patterns
    var additional: (keys: RegularState, value: Int32)?
    if let expression = object.additional {
      let keys = store.intersection([store.anything] + excluded + (permitted.map { [$0] } ?? []))
      if store.isAlive(keys), let value = try program.lowerValue(expression) { additional = (keys, value) }
    }
    self.additional = additional
    minimum = Int32(clamping: object.minimumCount)
    maximum = object.maximumCount.map { Int32(clamping: $0) } ?? .max
    countLimit = max(minimum, object.maximumCount == nil ? 0 : maximum)
    isOrdered = object.order == .declared
    whitespace = WhitespaceStates(object.whitespace, store)
    colon = store.concatenation([whitespace.around, store.byte(0x3A), whitespace.after])
    initial = State(seen: [UInt64](repeating: 0, count: words))
    if minimum > maximum { return nil }
    if required.reduce(0, { $0 + $1.nonzeroBitCount }) > Int(maximum) { return nil }
    if patterns.isEmpty, additional == nil, count < Int(minimum) { return nil }
    let choices = choices(initial)
    if !choices.close, !choices.anyName, !choices.others { return nil }
  }

  private static func contains(_ set: [UInt64], _ rank: Int) -> Bool { set[rank >> 6] >> UInt64(rank & 63) & 1 != 0 }

  /// Members that must still come, given those that came and perhaps one more.
  private func needed(_ state: State, with next: Int?) -> [UInt64] {
    var result = required
    if !implied.isEmpty {
      for rank in 0..<count where rank == next || Self.contains(state.seen, rank) {
        for word in 0..<words { result[word] |= implied[rank][word] }
      }
    }
    for word in 0..<words { result[word] &= ~state.seen[word] }
    if let next { result[next >> 6] &= ~(1 << UInt64(next & 63)) }
    return result
  }

  private func size(_ set: [UInt64]) -> Int32 {
    var result = 0
    for word in set { result += word.nonzeroBitCount }
    return Int32(result)
  }

  /// What may come next so that the object can still be completed.
  func choices(_ state: State) -> Choices {
    var result = Choices(names: [UInt64](repeating: 0, count: words))
    let needed = needed(state, with: nil)
    let missing = size(needed)
    let room = maximum == .max ? Int32.max : maximum - state.count
    result.close = missing == 0 && state.count >= minimum
    guard room > 0 else { return result }
    let hasOthers = additional != nil || !patterns.isEmpty
    if !isOrdered {
      result.others = hasOthers && missing < room
      for word in 0..<words {
        var bits = ~state.seen[word]
        if word == words - 1, count & 63 != 0 { bits &= (1 << UInt64(count & 63)) - 1 }
        result.names[word] = bits
      }
      if missing >= room { result.names = needed }
      if !implied.isEmpty, room != .max {
        for rank in 0..<count where Self.contains(result.names, rank) && size(self.needed(state, with: rank)) >= room {
          result.names[rank >> 6] &= ~(1 << UInt64(rank & 63))
        }
      }
      result.anyName = result.names.contains { $0 != 0 }
      return result
    }
    result.others = hasOthers && missing == 0
    if state.last == .max { return result }
    var nextNeeded = Int32.max
    for rank in 0..<count where Self.contains(needed, rank) { nextNeeded = min(nextNeeded, places[rank]) }
    for rank in 0..<count where places[rank] > state.last && places[rank] <= nextNeeded {
      let then = self.needed(state, with: rank)
      if size(then) >= room { continue }
      if !implied.isEmpty {
        var isLate = false
        for other in 0..<count where Self.contains(then, other) && places[other] < places[rank] { isLate = true }
        if isLate { continue }
      }
      if !hasOthers, minimum > state.count + 1 {
        var later: Int32 = 0
        for other in 0..<count where places[other] > places[rank] { later += 1 }
        if state.count + 1 + later < minimum { continue }
      }
      result.names[rank >> 6] |= 1 << UInt64(rank & 63)
      result.anyName = true
    }
    return result
  }

  /// The state after a member's key; `rank` is -1 for a member that is not declared.
  func after(_ state: State, rank: Int) -> State {
    var result = state
    result.count = min(state.count + 1, countLimit)
    if rank >= 0 {
      result.seen[rank >> 6] |= 1 << UInt64(rank & 63)
      if isOrdered { result.last = places[rank] }
    } else if isOrdered {
      result.last = .max
    }
    return result
  }

  /// The terminal that reads the next key (its quotes included) or the end; accepted with a member's tag.
  func next(_ choices: Choices, isFirst: Bool, _ store: RegularStore) -> RegularState {
    let quote = store.byte(0x22)
    var keys: [RegularState] = []
    if choices.anyName {
      keys.append(
        store.concatenation(store.escaped(store.keys(trie: trie, node: 0, names: choices.names)), quote))
    }
    if choices.others {
      for (index, pattern) in patterns.enumerated() {
        keys.append(
          store.tagged(store.concatenation(store.escaped(pattern.keys), quote), MemberTag.patterns + Int32(index)))
      }
      if let additional {
        keys.append(store.tagged(store.concatenation(store.escaped(additional.keys), quote), MemberTag.additional))
      }
    }
    var member = store.concatenation(quote, store.union(keys))
    let close = choices.close ? store.tagged(store.byte(0x7D), MemberTag.close) : RegularStore.never
    if isFirst {
      return store.concatenation([store.byte(0x7B), whitespace.around, store.union(member, close)])
    }
    member = store.concatenation([store.byte(0x2C), whitespace.after, member])
    return store.concatenation(whitespace.around, store.union(member, close))
  }
}

/// An array: its elements and what decides whether another may come.
struct ArrayProgram {
  struct Element {
    /// Nodes; -1 if there are no such values.
    var plain: Int32
    var matching: Int32

    var isPossible: Bool { plain >= 0 || matching >= 0 }
  }

  static let largestCount = (1 << 20) - 1
  static let largestMatches = (1 << 9) - 1

  let prefix: [Element]
  let items: Element
  let minimum: Int32
  /// `Int32.max` is no limit.
  let maximum: Int32
  let minimumMatches: Int32
  let maximumMatches: Int32
  private let indexLimit: Int32
  let whitespace: WhitespaceStates

  static func isProductive(_ array: ArrayExpression, _ test: (GrammarExpression) -> Bool) -> Bool {
    func isPossible(_ element: ArrayExpression.Element) -> Bool { test(element.plain) || test(element.matching) }
    if let maximum = array.maximumCount, maximum < array.minimumCount { return false }
    let needed = max(array.minimumCount, array.minimumMatches)
    for (index, element) in array.prefix.enumerated() where index < needed && !isPossible(element) { return false }
    if needed > array.prefix.count {
      guard let items = array.items, isPossible(items) else { return false }
    }
    return true
  }

  /// `nil` if no array matches.
  init?(_ array: ArrayExpression, _ program: GrammarProgram) throws(EngineError) {
    func lower(_ element: ArrayExpression.Element) throws(EngineError) -> Element {
      Element(
        plain: try program.lowerValue(element.plain) ?? -1, matching: try program.lowerValue(element.matching) ?? -1)
    }
    // No generation reaches a limit beyond what can be counted; a minimum there, none can meet.
    var limit = array.maximumCount.map { $0 > Self.largestCount ? .max : Int32($0) } ?? .max
    if array.minimumCount > Self.largestCount || array.minimumMatches > Self.largestMatches
      || (array.maximumMatches ?? 0) > Self.largestMatches
    {
      throw EngineError(
        .unsupported,
        "An array must have more than \(Self.largestCount) elements, or counts more than \(Self.largestMatches) matches"
      )
    }
    var prefix: [Element] = []
    for (index, element) in array.prefix.enumerated() where Int32(index) < limit {
      let lowered = try lower(element)
      if !lowered.isPossible {
        limit = min(limit, Int32(index))
        break
      }
      prefix.append(lowered)
    }
    var items = Element(plain: -1, matching: -1)
    if let expression = array.items, limit > Int32(prefix.count) { items = try lower(expression) }
    if !items.isPossible { limit = min(limit, Int32(prefix.count)) }
    self.prefix = prefix
    self.items = items
    minimum = Int32(clamping: array.minimumCount)
    maximum = limit
    minimumMatches = Int32(clamping: array.minimumMatches)
    maximumMatches = array.maximumMatches.map { Int32(clamping: $0) } ?? .max
    indexLimit = limit == .max ? max(Int32(prefix.count), minimum) : limit
    whitespace = WhitespaceStates(array.whitespace, program.store)
    if minimum > maximum || minimumMatches > maximumMatches { return nil }
    if possibleMatches(from: 0) < minimumMatches { return nil }
  }

  func element(at index: Int32) -> Element { Int(index) < prefix.count ? prefix[Int(index)] : items }

  /// How many elements from a place on can count as matches.
  private func possibleMatches(from index: Int32) -> Int32 {
    var result: Int32 = 0
    var place = index
    while Int(place) < prefix.count, place < maximum {
      if prefix[Int(place)].matching >= 0 { result += 1 }
      place += 1
    }
    if items.matching >= 0, maximum > place { return maximum == .max ? .max : result + maximum - place }
    return result
  }

  /// Which kinds of element may come at a place.
  func choices(index: Int32, matches: Int32) -> (plain: Bool, matching: Bool, close: Bool) {
    let close = index >= minimum && matches >= minimumMatches
    guard index < maximum else { return (false, false, close) }
    let element = element(at: index)
    // An index at its limit in an array without limit stands for all later ones.
    let later = possibleMatches(from: maximum == .max && index == indexLimit ? index : index + 1)
    let missing = minimumMatches - matches
    return (
      element.plain >= 0 && later >= missing,
      element.matching >= 0 && matches < maximumMatches && (later == .max || later + 1 >= missing), close
    )
  }

  func after(index: Int32, matches: Int32, counts: Bool) -> (index: Int32, matches: Int32) {
    let limit = maximumMatches == .max ? minimumMatches : maximumMatches
    return (min(index + 1, indexLimit), counts ? min(matches + 1, limit) : matches)
  }

  /// The terminal up to the next element (accepted with `item`) or through the end (`close`).
  func next(item: Bool, close: Bool, isFirst: Bool, _ store: RegularStore) -> RegularState {
    var item = item ? store.tagged(RegularStore.empty, MemberTag.item) : RegularStore.never
    let close = close ? store.tagged(store.byte(0x5D), MemberTag.close) : RegularStore.never
    if isFirst {
      return store.concatenation([store.byte(0x5B), whitespace.around, store.union(item, close)])
    }
    item = store.concatenation([store.byte(0x2C), whitespace.after, item])
    return store.concatenation(whitespace.around, store.union(item, close))
  }
}
