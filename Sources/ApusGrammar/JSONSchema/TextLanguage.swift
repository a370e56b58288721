internal import ApusCore

extension ScalarRanges {
  /// Every scalar: all code points but surrogates.
  static let everyScalar = ScalarRanges([0...0xD7FF, 0xE000...0x10FFFF])

  init(_ scalar: Unicode.Scalar) { self.init(scalar.value) }

  func contains(_ value: UInt32) -> Bool {
    var low = 0
    var high = ranges.count
    while low < high {
      let middle = (low + high) / 2
      if ranges[middle].upperBound < value { low = middle + 1 } else { high = middle }
    }
    return low < ranges.count && ranges[low].lowerBound <= value
  }
}

/// A regular language over Unicode scalars: an index into a `TextLanguages` table.
struct TextLanguage: Hashable, Sendable {
  fileprivate let index: Int32
}

/// Regular languages over Unicode scalars, closed under union, intersection and complement.
///
/// Expressions are interned, so that equal ones are one index, and questions about them are answered with derivatives
/// (Brzozowski 1964; Owens, Reppy, Turon 2009), which explore no more of an automaton than the question needs. Every
/// question has a limit on the derivatives taken; past it the answer is `nil`.
final class TextLanguages {
  enum Node: Hashable {
    case never
    case empty
    case scalars(ScalarRanges)
    case sequence(TextLanguage, TextLanguage)
    case choice([TextLanguage])
    case all([TextLanguage])
    case complement(TextLanguage)
    case repetition(TextLanguage, Int, Int?)
  }

  private(set) var nodes: [Node] = []
  private var interned: [Node: TextLanguage] = [:]
  private var nullable: [Bool] = []
  private var derivatives: [Derivation: TextLanguage] = [:]
  private var emptiness: [TextLanguage: Bool?] = [:]

  private struct Derivation: Hashable {
    var language: TextLanguage
    var scalar: UInt32
  }

  /// No text at all.
  let never: TextLanguage
  /// The empty text.
  let empty: TextLanguage
  /// Every text.
  let everything: TextLanguage

  /// Derivatives that one question may take.
  let stepLimit: Int
  /// Expressions that the table may hold.
  let nodeLimit: Int

  init(stepLimit: Int = 2_000, nodeLimit: Int = 400_000) {
    self.stepLimit = stepLimit
    self.nodeLimit = nodeLimit
    nodes = [.never, .empty, .scalars(.everyScalar), .repetition(TextLanguage(index: 2), 0, nil)]
    nullable = [false, true, false, true]
    never = TextLanguage(index: 0)
    empty = TextLanguage(index: 1)
    everything = TextLanguage(index: 3)
    for (index, node) in nodes.enumerated() { interned[node] = TextLanguage(index: Int32(index)) }
  }

  /// Whether the table has outgrown its limit, so that answers are not to be had any more.
  var isFull: Bool { nodes.count > nodeLimit }

  subscript(language: TextLanguage) -> Node { nodes[Int(language.index)] }

  func isNullable(_ language: TextLanguage) -> Bool { nullable[Int(language.index)] }

  private func intern(_ node: Node) -> TextLanguage {
    if let found = interned[node] { return found }
    let language = TextLanguage(index: Int32(nodes.count))
    let isNullable =
      switch node {
      case .never, .scalars: false
      case .empty: true
      case .sequence(let first, let second): self.isNullable(first) && self.isNullable(second)
      case .choice(let members): members.contains { self.isNullable($0) }
      case .all(let members): members.allSatisfy { self.isNullable($0) }
      case .complement(let inner): !self.isNullable(inner)
      case .repetition(let inner, let minimum, _): minimum == 0 || self.isNullable(inner)
      }
    nodes.append(node)
    nullable.append(isNullable)
    interned[node] = language
    return language
  }

  // MARK: Construction

  /// The texts of one scalar of a set. Surrogates are left out: they are not scalars.
  func scalars(_ set: ScalarRanges) -> TextLanguage {
    let set = set.ranges.last.map { $0.upperBound < 0xD800 } == true ? set : set.intersection(.everyScalar)
    return set.isEmpty ? never : intern(.scalars(set))
  }

  func literal(_ text: String) -> TextLanguage {
    var result = empty
    for scalar in text.unicodeScalars.reversed() { result = sequence(scalars(ScalarRanges(scalar)), result) }
    return result
  }

  func sequence(_ first: TextLanguage, _ second: TextLanguage) -> TextLanguage {
    if first == never || second == never { return never }
    if first == empty { return second }
    if second == empty { return first }
    // Kept leaning to the right, so that equal sequences are equal trees.
    if case .sequence(let head, let tail) = self[first] { return sequence(head, sequence(tail, second)) }
    if first == everything, case .sequence(let head, _) = self[second], head == everything { return second }
    if first == everything, second == everything { return everything }
    return intern(.sequence(first, second))
  }

  func sequence(_ parts: [TextLanguage]) -> TextLanguage { parts.reversed().reduce(empty) { sequence($1, $0) } }

  func choice(_ parts: [TextLanguage]) -> TextLanguage {
    var members: Set<TextLanguage> = []
    var set = ScalarRanges()
    func add(_ part: TextLanguage) {
      switch self[part] {
      case .never: break
      case .choice(let inner): for member in inner { add(member) }
      case .scalars(let scalars): set = set.union(scalars)
      default: members.insert(part)
      }
    }
    for part in parts { add(part) }
    if members.contains(everything) { return everything }
    if !set.isEmpty { members.insert(scalars(set)) }
    if members.contains(empty), members.contains(where: { $0 != empty && isNullable($0) }) { members.remove(empty) }
    for member in members {
      if case .complement(let inner) = self[member], members.contains(inner) { return everything }
    }
    if members.isEmpty { return never }
    if members.count == 1 { return members.first! }
    return intern(.choice(members.sorted { $0.index < $1.index }))
  }

  func all(_ parts: [TextLanguage]) -> TextLanguage {
    var members: Set<TextLanguage> = []
    var set: ScalarRanges?
    func add(_ part: TextLanguage) {
      switch self[part] {
      case .all(let inner): for member in inner { add(member) }
      case .scalars(let scalars): set = set.map { $0.intersection(scalars) } ?? scalars
      default: if part != everything { members.insert(part) }
      }
    }
    for part in parts { add(part) }
    if members.contains(never) { return never }
    if let set { members.insert(scalars(set)) }
    if members.contains(never) { return never }
    if members.contains(empty) { return members.allSatisfy(isNullable) ? empty : never }
    for member in members { if case .complement(let inner) = self[member], members.contains(inner) { return never } }
    if members.isEmpty { return everything }
    if members.count == 1 { return members.first! }
    return intern(.all(members.sorted { $0.index < $1.index }))
  }

  func complement(_ language: TextLanguage) -> TextLanguage {
    switch self[language] {
    case .never: everything
    case .complement(let inner): inner
    default: language == everything ? never : intern(.complement(language))
    }
  }

  func repetition(_ language: TextLanguage, _ minimum: Int, _ maximum: Int?) -> TextLanguage {
    if let maximum, maximum < minimum { return never }
    if maximum == 0 || language == empty { return empty }
    if language == never { return minimum == 0 ? empty : never }
    if minimum == 1, maximum == 1 { return language }
    if case .repetition(_, 0, nil) = self[language], maximum == nil || minimum <= 1 { return language }
    if minimum == 0, maximum == 1, isNullable(language) { return language }
    return intern(.repetition(language, minimum, maximum))
  }

  /// All texts of a number of scalars.
  func length(_ minimum: Int, _ maximum: Int?) -> TextLanguage { repetition(scalars(.everyScalar), minimum, maximum) }

  // MARK: Questions

  /// What may follow after a scalar.
  func derivative(_ language: TextLanguage, _ scalar: UInt32) -> TextLanguage {
    let key = Derivation(language: language, scalar: scalar)
    if let known = derivatives[key] { return known }
    let result: TextLanguage
    switch self[language] {
    case .never, .empty: result = never
    case .scalars(let set): result = set.contains(scalar) ? empty : never
    case .sequence(let first, let second):
      let ahead = sequence(derivative(first, scalar), second)
      result = isNullable(first) ? choice([ahead, derivative(second, scalar)]) : ahead
    case .choice(let members): result = choice(members.map { derivative($0, scalar) })
    case .all(let members): result = all(members.map { derivative($0, scalar) })
    case .complement(let inner): result = complement(derivative(inner, scalar))
    case .repetition(let inner, let minimum, let maximum):
      let rest = repetition(inner, max(0, minimum - 1), maximum.map { $0 - 1 })
      result = sequence(derivative(inner, scalar), rest)
    }
    derivatives[key] = result
    return result
  }

  /// Whether a text belongs to a language.
  func contains(_ language: TextLanguage, _ text: String) -> Bool {
    var state = language
    for scalar in text.unicodeScalars {
      state = derivative(state, scalar.value)
      if state == never { return false }
      if state == everything { return true }
    }
    return isNullable(state)
  }

  /// Whether no text belongs to a language; `nil` when that takes more steps than allowed.
  func isEmpty(_ language: TextLanguage) -> Bool? {
    if language == never { return true }
    if isNullable(language) { return false }
    if let known = emptiness[language] { return known }
    var seen: Set<TextLanguage> = [language]
    var stack = [language]
    var steps = 0
    var answer: Bool? = true
    search: while let state = stack.popLast() {
      for scalar in representatives(state) {
        steps += 1
        if steps > stepLimit || isFull {
          answer = nil
          break search
        }
        let next = derivative(state, scalar)
        if isNullable(next) {
          answer = false
          break search
        }
        if next != never, seen.insert(next).inserted { stack.append(next) }
      }
    }
    emptiness[language] = .some(answer)
    return answer
  }

  /// One scalar out of each class of scalars that a language's first step cannot tell apart.
  private func representatives(_ language: TextLanguage) -> [UInt32] {
    var sets: Set<ScalarRanges> = []
    var visited: Set<TextLanguage> = []
    func visit(_ language: TextLanguage) {
      guard visited.insert(language).inserted else { return }
      switch self[language] {
      case .never, .empty: break
      case .scalars(let set): sets.insert(set)
      case .sequence(let first, let second):
        visit(first)
        if isNullable(first) { visit(second) }
      case .choice(let members), .all(let members): for member in members { visit(member) }
      case .complement(let inner): visit(inner)
      case .repetition(let inner, _, _): visit(inner)
      }
    }
    visit(language)
    sets.remove(.everyScalar)
    if sets.isEmpty { return [0x61] }
    if sets.count == 1, let set = sets.first {
      let others = set.inverted.intersection(.everyScalar)
      return [set.ranges[0].lowerBound] + (others.isEmpty ? [] : [others.ranges[0].lowerBound])
    }
    var starts: Set<UInt32> = [0]
    for set in sets {
      for range in set.ranges {
        starts.insert(range.lowerBound)
        if range.upperBound < 0x10FFFF { starts.insert(range.upperBound + 1 == 0xD800 ? 0xE000 : range.upperBound + 1) }
      }
    }
    var signatures: Set<[Bool]> = []
    return starts.filter { start in signatures.insert(sets.map { $0.contains(start) }).inserted }
  }
}

extension TextLanguages {
  /// A language as an expression of the grammar.
  func expression(_ language: TextLanguage) -> RegularExpression {
    if language == everything { return .anything }
    switch self[language] {
    case .never: return .never
    case .empty: return .empty
    case .scalars(let set): return .scalars(set == .everyScalar ? .all : set)
    case .sequence:
      var parts: [RegularExpression] = []
      var bytes: [UInt8] = []
      var next = language
      func flush() {
        if !bytes.isEmpty { parts.append(.literal(bytes)) }
        bytes = []
      }
      func add(_ part: TextLanguage) {
        if case .scalars(let set) = self[part], let scalar = set.single {
          bytes += Array(UTF8.encode(scalar)!)
        } else if part != empty {
          flush()
          parts.append(expression(part))
        }
      }
      while case .sequence(let first, let second) = self[next] {
        add(first)
        next = second
      }
      add(next)
      flush()
      return parts.count == 1 ? parts[0] : .concatenation(parts)
    case .choice(let members): return .union(members.map { expression($0) })
    case .all(let members): return .intersection(members.map { expression($0) })
    case .complement(let inner): return .complement(expression(inner))
    case .repetition(let inner, let minimum, let maximum):
      return .repetition(expression(inner), minimum: minimum, maximum: maximum)
    }
  }
}

extension ScalarRanges {
  /// The only member, if there is just one.
  fileprivate var single: Unicode.Scalar? {
    ranges.count == 1 && ranges[0].count == 1 ? Unicode.Scalar(ranges[0].lowerBound) : nil
  }
}
