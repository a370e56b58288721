import ApusCore

/// Rewrites left-recursive rules, which a machine that reads from left to right cannot enter.
///
/// For rules A1...An that reach each other at their left end, each body is split into what does not begin with one of them
/// (B) and what follows one of them (C): Ai = Bi | A1 Ci1 | ... . Then Ai = B1 M1i | ... | Bn Mni, where Mji, what leads from
/// an Aj to an Ai, is right-recursive: Mji = (empty if j = i) | Ckj Mki for all k (Rosenkrantz 1967).
enum LeftRecursion {
  static func removed(from grammar: Grammar) throws(EngineError) -> Grammar {
    var analysis = Analysis(grammar: grammar)
    let components = analysis.components()
    if components.isEmpty { return grammar }
    for component in components { try analysis.rewrite(component) }
    return analysis.grammar
  }

  private struct Analysis {
    var grammar: Grammar
    var nullable: [Bool]

    init(grammar: Grammar) {
      self.grammar = grammar
      nullable = Nullability.rules(of: grammar)
    }

    func isNullable(_ expression: GrammarExpression) -> Bool { Nullability.isNullable(expression, nullable) }

    /// Rules that can stand at the very left of an expression.
    func leftRules(_ expression: GrammarExpression, _ found: inout Set<Int>) {
      switch expression {
      case .sequence(let parts):
        for part in parts {
          leftRules(part, &found)
          if !isNullable(part) { break }
        }
      case .choice(let parts): for part in parts { leftRules(part, &found) }
      case .repetition(let part, _, let maximum): if maximum != 0 { leftRules(part, &found) }
      case .rule(let reference): found.insert(reference.index)
      default: break
      }
    }

    /// Sets of rules that reach each other at their left ends.
    func components() -> [[Int]] {
      let edges = grammar.rules.map { rule in
        var found = Set<Int>()
        leftRules(rule.body, &found)
        return found.sorted()
      }
      // Tarjan's algorithm, without recursion.
      var index = 0
      var indices = [Int](repeating: -1, count: edges.count)
      var low = indices
      var onStack = [Bool](repeating: false, count: edges.count)
      var stack: [Int] = []
      var result: [[Int]] = []
      for start in edges.indices where indices[start] < 0 {
        var work: [(node: Int, next: Int)] = [(start, 0)]
        while let (node, next) = work.last {
          if next == 0 {
            indices[node] = index
            low[node] = index
            index += 1
            stack.append(node)
            onStack[node] = true
          }
          if next < edges[node].count {
            work[work.count - 1].next += 1
            let target = edges[node][next]
            if indices[target] < 0 {
              work.append((target, 0))
            } else if onStack[target] {
              low[node] = min(low[node], indices[target])
            }
            continue
          }
          work.removeLast()
          if let parent = work.last?.node { low[parent] = min(low[parent], low[node]) }
          if low[node] == indices[node] {
            var component: [Int] = []
            while let member = stack.popLast() {
              onStack[member] = false
              component.append(member)
              if member == node { break }
            }
            if component.count > 1 || edges[node].contains(node) { result.append(component.sorted()) }
          }
        }
      }
      return result
    }

    struct Split {
      /// What does not begin with a rule of the component.
      var plain: [GrammarExpression] = []
      /// What follows each of them.
      var after: [Int: [GrammarExpression]] = [:]
    }

    mutating func rewrite(_ component: [Int]) throws(EngineError) {
      let members = Set(component)
      var splits: [Int: Split] = [:]
      for member in component { splits[member] = try split(grammar.rules[member].body, members) }
      var bridges: [Int: [Int: RuleReference]] = [:]
      for from in component {
        for to in component {
          bridges[from, default: [:]][to] = grammar.addRule(
            "\(grammar.rules[to].name) after \(grammar.rules[from].name)")
          nullable.append(from == to)
        }
      }
      for from in component {
        for to in component {
          var choices: [GrammarExpression] = from == to ? [.empty] : []
          for through in component {
            for rest in splits[through]!.after[from] ?? [] {
              choices.append(.sequence([rest, .rule(bridges[through]![to]!)]))
            }
          }
          grammar.define(bridges[from]![to]!, .choice(choices))
        }
      }
      for member in component {
        var choices: [GrammarExpression] = []
        for from in component {
          for plain in splits[from]!.plain { choices.append(.sequence([plain, .rule(bridges[from]![member]!)])) }
        }
        grammar.rules[member].body = .choice(choices)
      }
    }

    private func reaches(_ expression: GrammarExpression, _ members: Set<Int>) -> Bool {
      var found = Set<Int>()
      leftRules(expression, &found)
      return !found.isDisjoint(with: members)
    }

    private func split(_ expression: GrammarExpression, _ members: Set<Int>) throws(EngineError) -> Split {
      guard reaches(expression, members) else { return Split(plain: [expression]) }
      switch expression {
      case .rule(let reference) where members.contains(reference.index):
        return Split(after: [reference.index: [.empty]])
      case .choice(let parts):
        var result = Split()
        for part in parts {
          let next = try split(part, members)
          result.plain += next.plain
          result.after.merge(next.after) { $0 + $1 }
        }
        return result
      case .repetition(let part, let minimum, let maximum):
        let inner: GrammarExpression = isNullable(part) ? try nonEmpty(part, members) : part
        let low = isNullable(part) ? 0 : minimum
        let rest = GrammarExpression.repetition(
          inner, minimum: max(low - 1, 0), maximum: maximum.map { max($0 - 1, 0) })
        let some = try split(.sequence([inner, rest]), members)
        return low == 0 ? Split(plain: [.empty] + some.plain, after: some.after) : some
      case .sequence(let parts):
        guard let first = parts.first else { return Split(plain: [.empty]) }
        let rest = GrammarExpression.sequence(Array(parts.dropFirst()))
        var result = Split()
        var head = try split(first, members)
        if isNullable(first), reaches(rest, members) {
          // Either the first part is empty, or it is not.
          if reaches(first, members) {
            throw EngineError(
              .unsupported, "A rule is left-recursive behind a left-recursive rule that can be empty")
          }
          head = Split(plain: [try nonEmpty(first, members)])
          result = try split(rest, members)
        }
        result.plain += head.plain.map { .sequence([$0, rest]) }
        for (member, after) in head.after {
          result.after[member, default: []] += after.map { .sequence([$0, rest]) }
        }
        return result
      default: return Split(plain: [expression])
      }
    }

    /// An expression without the empty text.
    private func nonEmpty(_ expression: GrammarExpression, _ members: Set<Int>, _ depth: Int = 0) throws(EngineError)
      -> GrammarExpression
    {
      if !isNullable(expression) { return expression }
      if depth > 50 { throw EngineError(.unsupported, "A rule is left-recursive behind too many that can be empty") }
      switch expression {
      case .empty, .literal, .never, .special: return .never
      case .choice(let parts):
        var result: [GrammarExpression] = []
        for part in parts { result.append(try nonEmpty(part, members, depth + 1)) }
        return .choice(result)
      case .sequence(let parts):
        guard let first = parts.first else { return .never }
        let rest = GrammarExpression.sequence(Array(parts.dropFirst()))
        return .choice([
          .sequence([try nonEmpty(first, members, depth + 1), rest]), try nonEmpty(rest, members, depth + 1),
        ])
      case .repetition(let part, let minimum, let maximum):
        if maximum == 0 { return .never }
        let inner = try nonEmpty(part, members, depth + 1)
        return .repetition(inner, minimum: isNullable(part) ? 1 : max(minimum, 1), maximum: maximum)
      case .rule(let reference):
        if members.contains(reference.index) {
          throw EngineError(.unsupported, "A rule is left-recursive behind itself")
        }
        return try nonEmpty(grammar.rules[reference.index].body, members, depth + 1)
      case .regular(let regular): return .regular(.intersection([regular, .complement(.empty)]))
      case .characters, .object, .array: return expression
      case .tags: throw EngineError(.unsupported, "A rule is left-recursive behind free text")
      }
    }
  }
}

/// Which expressions match the empty text.
enum Nullability {
  /// Of each rule, whether it matches the empty text.
  static func rules(of grammar: Grammar) -> [Bool] {
    var nullable = Array(repeating: false, count: grammar.rules.count)
    var changed = true
    while changed {
      changed = false
      for index in grammar.rules.indices.reversed()
      where !nullable[index] && isNullable(grammar.rules[index].body, nullable) {
        nullable[index] = true
        changed = true
      }
    }
    return nullable
  }

  static func isNullable(_ expression: GrammarExpression, _ rules: [Bool]) -> Bool {
    switch expression {
    case .never, .characters, .object, .array: false
    case .empty: true
    case .literal(let bytes): bytes.isEmpty
    case .special(let text): text.isEmpty
    case .sequence(let parts): parts.allSatisfy { isNullable($0, rules) }
    case .choice(let parts): parts.contains { isNullable($0, rules) }
    case .repetition(let part, let minimum, _): minimum == 0 || isNullable(part, rules)
    case .rule(let reference): rules[reference.index]
    case .regular(let expression): expression.acceptsEmpty
    case .tags(let tags): tags.allowsText && !tags.isRequired
    }
  }
}
