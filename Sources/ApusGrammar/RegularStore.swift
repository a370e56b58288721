import ApusCore

/// A regular language during matching: the number of an expression in a `RegularStore`. `0` is the empty language.
typealias RegularState = Int32

/// Regular expressions over bytes, each held once, and the lazily built deterministic automaton of their derivatives.
///
/// A state of the automaton is an expression; its successor by a byte is the expression's derivative (Brzozowski 1964),
/// kept in a normal form in which equal states are usually the same number (Owens, Reppy, Turon 2009). So intersection,
/// complement and counted repetition cost nothing until a text leads there. A row of successors holds only states from
/// which some text is accepted: a match never ends in a state that nothing completes.
///
/// Not synchronised: the owner holds a lock.
final class RegularStore {
  static let never: RegularState = 0
  static let empty: RegularState = 1
  /// Every sequence of bytes.
  static let allBytes: RegularState = 2
  /// An acceptance without tag.
  static let untagged: Int32 = -1

  enum Kind: UInt8 {
    case never, empty, allBytes
    /// `a` is the first of `b` triples (low byte, high byte, target) in `pool`.
    case branch
    case concatenation
    /// `a` is the first of `b` members in `pool`.
    case union, intersection
    case complement
    /// `a` from `b` to `c` times; `c` is -1 for no limit.
    case repetition
    /// `a`; acceptance carries the tag `b`.
    case tagged
    /// `a` without the empty text.
    case nonEmpty
    /// `a` as written between the quotes of a JSON string.
    case escaped
    /// In the middle of an escape; `b` says where, `c` holds the digits' value.
    case pending
    /// Node `b` of the key trie `a`, of whose names those in the set `c` remain.
    case keys
    /// Node `b` of the text search `a`.
    case search
    /// Digits and points whose digits, after others of residue `b`, are a multiple of `a`.
    case digits
  }

  struct Node {
    var kind: Kind
    /// 0 is unknown, 1 alive, 2 dead.
    var liveness: UInt8
    var hasTags: Bool
    var a: Int32
    var b: Int32
    var c: Int32
    var hash: Hash128
  }

  /// A hash of the content, equal between stores.
  struct Hash128: Hashable {
    var low: UInt64
    var high: UInt64

    init(_ low: UInt64, _ high: UInt64) {
      self.low = low
      self.high = high
    }

    @inline(__always)
    static func mixed(_ value: UInt64) -> UInt64 {
      var x = value &+ 0x9E37_79B9_7F4A_7C15
      x = (x ^ (x >> 30)) &* 0xBF58_476D_1CE4_E5B9
      x = (x ^ (x >> 27)) &* 0x94D0_49BB_1331_11EB
      return x ^ (x >> 31)
    }

    @inline(__always)
    mutating func combine(_ value: UInt64) {
      low = Self.mixed(low ^ value)
      high = Self.mixed(high &* 0xD6E8_FEB8_6659_FD93 ^ value ^ 0xA5A5_A5A5_5A5A_5A5A)
    }

    @inline(__always)
    mutating func combine(_ other: Hash128) {
      combine(other.low)
      high = Self.mixed(high ^ other.high)
    }

    @inline(__always)
    mutating func add(_ other: Hash128) {
      low = low &+ Self.mixed(other.low)
      high = high &+ Self.mixed(other.high)
    }
  }

  // MARK: Storage

  // Accesses are not checked for overlap at run time: they are short, and the owner holds a lock.
  @exclusivity(unchecked) private(set) var nodes: ContiguousArray<Node> = []
  @exclusivity(unchecked) private(set) var pool: ContiguousArray<Int32> = []
  @exclusivity(unchecked) private var table: InternTable
  /// Successors of states, 256 each; `nil` until asked for.
  @exclusivity(unchecked) private(set) var rows: UnsafeMutablePointer<UnsafeMutablePointer<RegularState>?>
  /// Number of the acceptance set of each state.
  @exclusivity(unchecked) private(set) var acceptance: UnsafeMutablePointer<Int32>
  /// By state: what `relaxed` and `slack` found; `unknown` where nobody asked.
  @exclusivity(unchecked) private var relaxedStates: UnsafeMutablePointer<Int32>
  @exclusivity(unchecked) private var slacks: UnsafeMutablePointer<Int32>
  private static let unknown = Int32.min
  /// By state: classes of bytes (`ByteClass`) all of which lead from it to itself; `unknownLoops` where nobody asked.
  @exclusivity(unchecked) private var loops: UnsafeMutablePointer<UInt64>
  private static let unknownLoops = UInt64.max
  /// By state: how often one successor was asked for before there was a row.
  @exclusivity(unchecked) private var visits: UnsafeMutablePointer<UInt8>
  /// Successors computed one by one before a row is: most states of a walk are passed by a few bytes only.
  private static let visitsBeforeRow: UInt8 = 8
  private var capacity: Int
  private var rowCount = 0
  @exclusivity(unchecked) private(set) var acceptanceSets: [[Int32]] = [[], [RegularStore.untagged]]
  private var acceptanceIndex: [[Int32]: Int32] = [[]: 0, [RegularStore.untagged]: 1]
  @exclusivity(unchecked) private(set) var tries: [KeyTrie] = []
  private(set) var searches: [TextSearch] = []
  private var nameSets: [[UInt64]] = [[]]
  private var nameSetIndex: [[UInt64]: Int32] = [:]
  private(set) var utf8Scalar: RegularState = 0
  /// Every text.
  private(set) var anything: RegularState = 0

  /// Set when a limit was reached; what was asked for then is not what came.
  private(set) var overflow: String?
  /// Expressions at most; an expression takes about 80 bytes.
  var maximumNodes = 1 << 20
  /// Derivatives of parts taken since `beginOperation`, and how many one operation may take: what stalls nobody.
  @exclusivity(unchecked) private var work = 0
  private var workLimit = RegularStore.compileWork
  static let compileWork = 1 << 25
  static let matchWork = 1 << 22
  /// Nodes of the token tree visited for masks: what `CompiledGrammar.warmUp` bounds its work by.
  @exclusivity(unchecked) var visitedNodes = 0
  /// Where the work on a mask that is being filled ends.
  @exclusivity(unchecked) private var maskEnd = Int.max
  /// Members of one union or intersection at most.
  static let maximumMembers = 1 << 14
  /// States looked at to find out whether anything is accepted.
  static let maximumExploration = 1 << 14
  /// Rows kept; each takes a kilobyte. Beyond it they are dropped and built again.
  static let maximumRows = 1 << 14

  init() {
    capacity = 1 << 10
    rows = .allocate(capacity: capacity)
    rows.initialize(repeating: nil, count: capacity)
    acceptance = .allocate(capacity: capacity)
    acceptance.initialize(repeating: 0, count: capacity)
    relaxedStates = .allocate(capacity: capacity)
    relaxedStates.initialize(repeating: Self.unknown, count: capacity)
    slacks = .allocate(capacity: capacity)
    slacks.initialize(repeating: Self.unknown, count: capacity)
    loops = .allocate(capacity: capacity)
    loops.initialize(repeating: Self.unknownLoops, count: capacity)
    visits = .allocate(capacity: capacity)
    visits.initialize(repeating: 0, count: capacity)
    table = InternTable(capacity: 1 << 10)
    for kind in [Kind.never, .empty, .allBytes] {
      _ = add(kind, 0, 0, 0, Self.seed(kind), accepts: kind == .never ? 0 : 1)
    }
    nodes[0].liveness = 2
    utf8Scalar = scalars(ScalarRanges([0...0xD7FF, 0xE000...0x10FFFF]))
    anything = repetition(utf8Scalar, 0, -1)
  }

  deinit {
    dropRows()
    rows.deallocate()
    acceptance.deallocate()
    relaxedStates.deallocate()
    slacks.deallocate()
    loops.deallocate()
    visits.deallocate()
  }

  private func overflowed(_ message: String) {
    if overflow == nil { overflow = message }
  }

  /// Frees all rows. States stay what they are.
  func dropRows() {
    for state in 0..<nodes.count {
      rows[state]?.deallocate()
      rows[state] = nil
    }
    rowCount = 0
  }

  /// Whether rows take as much room as they may: the owner drops them when no walk is under way.
  var isFull: Bool { rowCount >= Self.maximumRows }

  var count: Int { nodes.count }

  private static func seed(_ kind: Kind) -> Hash128 {
    Hash128(Hash128.mixed(UInt64(kind.rawValue) &+ 101), Hash128.mixed(UInt64(kind.rawValue) &+ 977))
  }

  /// The expression of a hash, or a new one.
  private func add(
    _ kind: Kind, _ a: Int32, _ b: Int32, _ c: Int32, _ hash: Hash128, accepts: Int32, hasTags: Bool = false,
    list: [Int32]? = nil
  ) -> RegularState {
    let slot = table.find(hash.low, hash.high)
    if let found = table.value(at: slot) { return found }
    if nodes.count >= maximumNodes {
      overflowed("its automaton needs more than \(maximumNodes) states")
      return Self.never
    }
    var a = a
    var b = b
    if let list {
      a = Int32(pool.count)
      b = Int32(kind == .branch ? list.count / 3 : list.count)
      pool.append(contentsOf: list)
    }
    let id = Int32(nodes.count)
    nodes.append(Node(kind: kind, liveness: 0, hasTags: hasTags, a: a, b: b, c: c, hash: hash))
    table.insert(hash.low, hash.high, id, at: slot)
    if nodes.count > capacity { grow() }
    acceptance[Int(id)] = accepts
    return id
  }

  private func grow() {
    let larger = capacity * 2
    let old = capacity
    func extend<Element>(_ memory: inout UnsafeMutablePointer<Element>, _ value: Element) {
      let fresh = UnsafeMutablePointer<Element>.allocate(capacity: larger)
      fresh.moveInitialize(from: memory, count: old)
      (fresh + old).initialize(repeating: value, count: larger - old)
      memory.deallocate()
      memory = fresh
    }
    extend(&rows, nil)
    extend(&acceptance, 0)
    extend(&relaxedStates, Self.unknown)
    extend(&slacks, Self.unknown)
    extend(&loops, Self.unknownLoops)
    extend(&visits, 0)
    capacity = larger
  }

  /// Starts the count of work anew.
  func beginOperation(limit: Int = RegularStore.matchWork) {
    work = 0
    workLimit = limit
  }

  /// Bounds the work on a mask, which begins with `beginOperation`: nodes of the token tree, and derivatives, each of which
  /// counts as some nodes; `Int.max` is no bound.
  func limitMask(_ limit: Int) { maskEnd = limit == .max ? .max : visitedNodes + limit }

  /// Whether the mask that is being filled has taken the work that it may.
  /// - Parameter visited: nodes visited that `visitedNodes` does not count yet.
  @inline(__always)
  func exceedsMaskWork(_ visited: Int) -> Bool { visitedNodes &+ visited &+ work &* Self.derivativeCost > maskEnd }

  /// What a derivative costs, in nodes of the token tree.
  private static let derivativeCost = 8

  /// Derivatives taken since `beginOperation`.
  var workDone: Int { work }

  func accepts(_ state: RegularState) -> Bool { acceptance[Int(state)] != 0 }

  func acceptanceSet(_ tags: [Int32]) -> Int32 {
    if let found = acceptanceIndex[tags] { return found }
    let id = Int32(acceptanceSets.count)
    acceptanceSets.append(tags)
    acceptanceIndex[tags] = id
    return id
  }

  private func acceptanceUnion(_ left: Int32, _ right: Int32) -> Int32 {
    if left == right || right == 0 { return left }
    if left == 0 { return right }
    return acceptanceSet(Set(acceptanceSets[Int(left)] + acceptanceSets[Int(right)]).sorted())
  }

  func hash(_ state: RegularState) -> Hash128 { nodes[Int(state)].hash }

  // MARK: Constructors

  /// One byte of ranges, each with what follows; ranges are sorted and disjoint.
  func branch(_ entries: [(low: UInt8, high: UInt8, target: RegularState)]) -> RegularState {
    var list: [Int32] = []
    list.reserveCapacity(entries.count * 3)
    var hash = Self.seed(.branch)
    var hasTags = false
    for entry in entries where entry.target != Self.never {
      if list.count >= 3, list[list.count - 1] == entry.target, list[list.count - 2] + 1 == Int32(entry.low) {
        list[list.count - 2] = Int32(entry.high)
        continue
      }
      list += [Int32(entry.low), Int32(entry.high), entry.target]
    }
    if list.isEmpty { return Self.never }
    for index in stride(from: 0, to: list.count, by: 3) {
      hash.combine(UInt64(list[index]) << 8 | UInt64(list[index + 1]))
      hash.combine(nodes[Int(list[index + 2])].hash)
      hasTags = hasTags || nodes[Int(list[index + 2])].hasTags
    }
    return add(.branch, 0, 0, 0, hash, accepts: 0, hasTags: hasTags, list: list)
  }

  /// One byte.
  func byte(_ byte: UInt8, then target: RegularState = RegularStore.empty) -> RegularState {
    branch([(byte, byte, target)])
  }

  /// These bytes.
  func literal(_ bytes: [UInt8], then target: RegularState = RegularStore.empty) -> RegularState {
    var state = target
    for byte in bytes.reversed() { state = self.byte(byte, then: state) }
    return state
  }

  func concatenation(_ left: RegularState, _ right: RegularState) -> RegularState {
    if left == Self.never || right == Self.never { return Self.never }
    if left == Self.empty { return right }
    if right == Self.empty { return left }
    let node = nodes[Int(left)]
    if node.kind == .concatenation { return concatenation(node.a, concatenation(node.b, right)) }
    if node.kind == .tagged, !nodes[Int(right)].hasTags { return tagged(concatenation(node.a, right), node.b) }
    let other = nodes[Int(right)]
    var hash = Self.seed(.concatenation)
    hash.combine(node.hash)
    hash.combine(other.hash)
    var accepts: Int32 = 0
    let first = acceptance[Int(left)]
    let second = acceptance[Int(right)]
    if first == 1 {
      accepts = second
    } else if first != 0, second != 0 {
      var tags = Set(acceptanceSets[Int(first)])
      if tags.remove(Self.untagged) != nil { tags.formUnion(acceptanceSets[Int(second)]) }
      accepts = acceptanceSet(tags.sorted())
    }
    return add(
      .concatenation, left, right, 0, hash, accepts: accepts, hasTags: node.hasTags || other.hasTags)
  }

  func concatenation(_ parts: [RegularState]) -> RegularState {
    var state = Self.empty
    for part in parts.reversed() { state = concatenation(part, state) }
    return state
  }

  func union(_ left: RegularState, _ right: RegularState) -> RegularState {
    if left == right || right == Self.never { return left }
    if left == Self.never { return right }
    return union([left, right])
  }

  func union(_ parts: [RegularState]) -> RegularState {
    var members: [Int32] = []
    var absorbsUntagged = false
    for part in parts where part != Self.never {
      let node = nodes[Int(part)]
      if node.kind == .union {
        members += pool[Int(node.a)..<Int(node.a + node.b)]
      } else {
        members.append(part)
      }
    }
    members.sort()
    var unique: [Int32] = []
    for member in members where unique.last != member { unique.append(member) }
    // Every text takes in all others; what is not a text does not occur beside it.
    absorbsUntagged = unique.contains(anything) && anything != 0
    if absorbsUntagged { unique.removeAll { $0 != anything && !nodes[Int($0)].hasTags } }
    if unique.contains(Self.allBytes) { unique.removeAll { $0 != Self.allBytes && !nodes[Int($0)].hasTags } }
    if unique.count > 1, unique[0] == Self.empty, unique.dropFirst().contains(where: { acceptance[Int($0)] == 1 }) {
      unique.removeFirst()
    }
    if unique.isEmpty { return Self.never }
    if unique.count == 1 { return unique[0] }
    if unique.count > Self.maximumMembers {
      overflowed("it needs more than \(Self.maximumMembers) parallel alternatives")
      return Self.never
    }
    var sum = Hash128(0, 0)
    var accepts: Int32 = 0
    var hasTags = false
    for member in unique {
      sum.add(nodes[Int(member)].hash)
      accepts = acceptanceUnion(accepts, acceptance[Int(member)])
      hasTags = hasTags || nodes[Int(member)].hasTags
    }
    var hash = Self.seed(.union)
    hash.combine(sum)
    return add(.union, 0, 0, 0, hash, accepts: accepts, hasTags: hasTags, list: unique)
  }

  /// The texts in all of some languages. Operands carry no tags.
  func intersection(_ parts: [RegularState]) -> RegularState {
    var members: [Int32] = []
    for part in parts {
      if part == Self.never { return Self.never }
      let node = nodes[Int(part)]
      if node.kind == .intersection {
        members += pool[Int(node.a)..<Int(node.a + node.b)]
      } else if part != Self.allBytes {
        members.append(part)
      }
    }
    members.sort()
    var unique: [Int32] = []
    for member in members where unique.last != member { unique.append(member) }
    if unique.contains(Self.empty) {
      return unique.allSatisfy { acceptance[Int($0)] != 0 } ? Self.empty : Self.never
    }
    // Beside a language of texts, "every text" says nothing.
    if unique.contains(anything), unique.contains(where: { $0 != anything && nodes[Int($0)].kind != .complement }) {
      unique.removeAll { $0 == anything }
    }
    // No text is outside of "every text".
    if unique.contains(where: { nodes[Int($0)].kind == .complement && nodes[Int($0)].a == anything }),
      unique.contains(where: { nodes[Int($0)].kind != .complement })
    {
      return Self.never
    }
    if unique.isEmpty { return Self.allBytes }
    if unique.count == 1 { return unique[0] }
    if unique.count > Self.maximumMembers {
      overflowed("it needs more than \(Self.maximumMembers) parallel conditions")
      return Self.never
    }
    // Two counts of the same set are one count: [a-z]{2,} and .{0,9}.
    if let merged = mergedRepetition(unique) { return merged }
    var sum = Hash128(0, 0)
    var accepts: Int32 = 1
    for member in unique {
      sum.add(nodes[Int(member)].hash)
      if acceptance[Int(member)] == 0 { accepts = 0 }
    }
    var hash = Self.seed(.intersection)
    hash.combine(sum)
    return add(.intersection, 0, 0, 0, hash, accepts: accepts, list: unique)
  }

  /// Repetitions of single scalars of which one set is every scalar: the counts meet.
  private func mergedRepetition(_ members: [Int32]) -> RegularState? {
    guard members.count == 2 else { return nil }
    for (one, two) in [(0, 1), (1, 0)] {
      let length = nodes[Int(members[one])]
      let other = nodes[Int(members[two])]
      guard length.kind == .repetition, length.a == utf8Scalar else { continue }
      if other.kind == .repetition, scalarSets.contains(other.a) {
        let low = max(length.b, other.b)
        let high = length.c < 0 ? other.c : other.c < 0 ? length.c : min(length.c, other.c)
        return high >= 0 && high < low ? Self.never : repetition(other.a, low, high)
      }
      if scalarSets.contains(members[two]) { return length.b <= 1 && length.c != 0 ? members[two] : Self.never }
      if other.kind == .concatenation, scalarSets.contains(other.a) || repeatsScalar(other.a) {
        // [A-Z][a-z]* and .{0,9}: what the first takes is taken off the count.
        if scalarSets.contains(other.a) {
          let rest = repetition(utf8Scalar, max(length.b - 1, 0), length.c < 0 ? -1 : length.c - 1)
          if length.c == 0 { return Self.never }
          return concatenation(other.a, intersection([other.b, rest]))
        }
      }
    }
    return nil
  }

  private func repeatsScalar(_ state: RegularState) -> Bool {
    nodes[Int(state)].kind == .repetition && scalarSets.contains(nodes[Int(state)].a)
  }

  /// All sequences of bytes but those; meet it with `anything` for texts.
  func complement(_ state: RegularState) -> RegularState {
    if state == Self.never { return Self.allBytes }
    if state == Self.allBytes { return Self.never }
    let node = nodes[Int(state)]
    if node.kind == .complement { return node.a }
    var hash = Self.seed(.complement)
    hash.combine(node.hash)
    return add(.complement, state, 0, 0, hash, accepts: acceptance[Int(state)] == 0 ? 1 : 0)
  }

  /// A language from `minimum` to `maximum` times; -1 is no limit. The operand carries no tags.
  func repetition(_ state: RegularState, _ minimum: Int32, _ maximum: Int32) -> RegularState {
    if maximum == 0 || state == Self.empty { return Self.empty }
    if state == Self.never { return minimum == 0 ? Self.empty : Self.never }
    let minimum = accepts(state) ? 0 : minimum
    if minimum == 1, maximum == 1 { return state }
    let node = nodes[Int(state)]
    if node.kind == .repetition, node.b == 0, node.c < 0 { return state }
    var hash = Self.seed(.repetition)
    hash.combine(node.hash)
    hash.combine(UInt64(UInt32(bitPattern: minimum)) << 32 | UInt64(UInt32(bitPattern: maximum)))
    return add(.repetition, state, minimum, maximum, hash, accepts: minimum == 0 ? 1 : 0)
  }

  func tagged(_ state: RegularState, _ tag: Int32) -> RegularState {
    if state == Self.never { return Self.never }
    let node = nodes[Int(state)]
    if node.kind == .tagged { return state }
    var hash = Self.seed(.tagged)
    hash.combine(node.hash)
    hash.combine(UInt64(UInt32(bitPattern: tag)))
    return add(
      .tagged, state, tag, 0, hash, accepts: acceptance[Int(state)] == 0 ? 0 : acceptanceSet([tag]), hasTags: true)
  }

  /// A language without the empty text.
  func nonEmpty(_ state: RegularState) -> RegularState {
    if !accepts(state) { return state }
    if state == Self.empty { return Self.never }
    var hash = Self.seed(.nonEmpty)
    hash.combine(nodes[Int(state)].hash)
    return add(.nonEmpty, state, 0, 0, hash, accepts: 0, hasTags: nodes[Int(state)].hasTags)
  }

  /// The ways to write a language's texts between the quotes of a JSON string.
  func escaped(_ state: RegularState) -> RegularState {
    if state == Self.never || state == Self.empty { return state }
    let node = nodes[Int(state)]
    if node.kind == .tagged { return tagged(escaped(node.a), node.b) }
    var hash = Self.seed(.escaped)
    hash.combine(node.hash)
    return add(.escaped, state, 0, 0, hash, accepts: acceptance[Int(state)], hasTags: node.hasTags)
  }

  private func pending(_ state: RegularState, _ place: Int32, _ value: Int32) -> RegularState {
    if state == Self.never { return Self.never }
    var hash = Self.seed(.pending)
    hash.combine(nodes[Int(state)].hash)
    hash.combine(UInt64(UInt32(bitPattern: place)) << 32 | UInt64(UInt32(bitPattern: value)))
    return add(.pending, state, place, value, hash, accepts: 0, hasTags: nodes[Int(state)].hasTags)
  }

  /// Adds a set of names; `keys` makes a language of it.
  func addTrie(_ trie: KeyTrie) -> Int32 {
    tries.append(trie)
    return Int32(tries.count - 1)
  }

  /// The names of a trie below a node, as far as they are in a set (by rank); each is accepted with its tag.
  func keys(trie: Int32, node: Int32, names: [UInt64]?) -> RegularState {
    let tree = tries[Int(trie)]
    let place = tree.nodes[Int(node)]
    var set: Int32 = 0
    var hash = Self.seed(.keys)
    hash.combine(place.hash)
    if let names {
      let part = KeyTrie.restricted(names, place.firstRank..<place.endRank)
      guard part.count > 0 else { return Self.never }
      if part.count < Int(place.endRank - place.firstRank) {
        if let found = nameSetIndex[part.words] {
          set = found
        } else {
          set = Int32(nameSets.count)
          nameSets.append(part.words)
          nameSetIndex[part.words] = set
        }
        // Ranks are relative to the subtree, so that equal subtrees of other objects hash alike.
        for rank in place.firstRank..<place.endRank where part.words[Int(rank >> 6)] >> UInt64(rank & 63) & 1 != 0 {
          hash.combine(UInt64(rank - place.firstRank))
        }
      }
    } else if place.firstRank == place.endRank {
      return Self.never
    }
    var accepts: Int32 = 0
    if place.tag >= 0,
      set == 0 || nameSets[Int(set)][Int(place.firstRank >> 6)] >> UInt64(place.firstRank & 63) & 1 != 0
    {
      accepts = acceptanceSet([place.tag])
    }
    return add(.keys, trie, node, set, hash, accepts: accepts, hasTags: true)
  }

  /// Digits and points whose digits as one integer are a multiple of a positive integer.
  func digits(multipleOf modulus: Int, residue: Int32 = 0) -> RegularState {
    guard modulus > 0, modulus <= Int(Int32.max) else {
      overflowed("a multiple of \(modulus) is beyond what can be counted")
      return Self.never
    }
    var hash = Self.seed(.digits)
    hash.combine(UInt64(modulus) << 32 | UInt64(residue))
    return add(.digits, Int32(modulus), residue, 0, hash, accepts: residue == 0 ? 1 : 0)
  }

  func addSearch(_ search: TextSearch) -> Int32 {
    searches.append(search)
    return Int32(searches.count - 1)
  }

  /// Free text up to and including the first occurrence of one of some texts, which is accepted with its tag; the text
  /// before it is accepted with `TextSearch.endTag` if the search permits an end.
  func search(_ search: Int32, _ node: Int32 = 0) -> RegularState {
    let tree = searches[Int(search)]
    if tree.nodes[Int(node)].tag >= 0 { return tagged(Self.empty, tree.nodes[Int(node)].tag) }
    var hash = Self.seed(.search)
    hash.combine(tree.hash)
    hash.combine(UInt64(node))
    // Inside a special token the text cannot end.
    let canEnd = tree.permitsEnd && tree.nodes[Int(node)].markers == 0
    return add(
      .search, search, node, 0, hash, accepts: canEnd ? acceptanceSet([TextSearch.endTag]) : 0, hasTags: true)
  }

  // MARK: Scalars

  private var scalarSets: Set<RegularState> = []

  /// One scalar of a set, as UTF-8.
  func scalars(_ set: ScalarRanges) -> RegularState {
    let valid = set.intersection(ScalarRanges([0...0xD7FF, 0xE000...0x10FFFF]))
    var sequences: [[ClosedRange<UInt8>]] = []
    for range in valid.ranges { Self.forEachUTF8Range(range) { sequences.append($0) } }
    let state = branches(sequences[...], 0)
    if state != Self.never { scalarSets.insert(state) }
    return state
  }

  private func branches(_ sequences: ArraySlice<[ClosedRange<UInt8>]>, _ depth: Int) -> RegularState {
    var entries: [(low: UInt8, high: UInt8, target: RegularState)] = []
    var index = sequences.startIndex
    while index < sequences.endIndex {
      let range = sequences[index][depth]
      if sequences[index].count == depth + 1 {
        entries.append((range.lowerBound, range.upperBound, Self.empty))
        index += 1
        continue
      }
      var end = index + 1
      while end < sequences.endIndex, sequences[end].count > depth + 1, sequences[end][depth] == range { end += 1 }
      entries.append((range.lowerBound, range.upperBound, branches(sequences[index..<end], depth + 1)))
      index = end
    }
    return branch(entries)
  }

  /// Splits a range of scalars into sequences of byte ranges whose products are its UTF-8.
  static func forEachUTF8Range(_ range: ClosedRange<UInt32>, _ body: ([ClosedRange<UInt8>]) -> Void) {
    var low = range.lowerBound
    while low <= range.upperBound {
      var high = range.upperBound
      for limit: UInt32 in [0x7F, 0x7FF, 0xFFFF] where low <= limit { high = min(high, limit); break }
      let length = low < 0x80 ? 1 : low < 0x800 ? 2 : low < 0x10000 ? 3 : 4
      // Cut so that all bytes after the first that differs run through their whole range.
      for level in stride(from: length - 1, to: 0, by: -1) {
        let mask = (UInt32(1) << UInt32(6 * level)) - 1
        if low & ~mask != high & ~mask {
          if low & mask != 0 {
            high = min(high, low | mask)
          } else if high & mask != mask {
            high = min(high, (high & ~mask) - 1)
          }
        }
      }
      func bytes(_ scalar: UInt32) -> [UInt8] {
        switch length {
        case 1: [UInt8(scalar)]
        case 2: [UInt8(0xC0 | scalar >> 6), UInt8(0x80 | scalar & 63)]
        case 3: [UInt8(0xE0 | scalar >> 12), UInt8(0x80 | scalar >> 6 & 63), UInt8(0x80 | scalar & 63)]
        default:
          [
            UInt8(0xF0 | scalar >> 18), UInt8(0x80 | scalar >> 12 & 63), UInt8(0x80 | scalar >> 6 & 63),
            UInt8(0x80 | scalar & 63),
          ]
        }
      }
      body(zip(bytes(low), bytes(high)).map { $0...$1 })
      low = high + 1
    }
  }

  // MARK: Derivatives

  private enum Place {
    static let backslash: Int32 = 0
    static let digits: Int32 = 1
    static let lowBackslash: Int32 = 2
    static let lowMarker: Int32 = 3
  }

  /// What may follow a byte. The result may be dead without being `never`; rows hold only live states.
  func derivative(_ state: RegularState, _ byte: UInt8) -> RegularState {
    if let row = rows[Int(state)] { return row[Int(byte)] }
    work &+= 1
    if work > workLimit {
      overflowed("one step takes more than \(workLimit) derivatives")
      return Self.never
    }
    let node = nodes[Int(state)]
    switch node.kind {
    case .never, .empty: return Self.never
    case .allBytes: return state
    case .branch:
      var low = Int(node.a)
      var high = low + Int(node.b) * 3
      while low < high {
        let middle = low + (high - low) / 6 * 3
        if Int32(byte) < pool[middle] {
          high = middle
        } else if Int32(byte) > pool[middle + 1] {
          low = middle + 3
        } else {
          return pool[middle + 2]
        }
      }
      return Self.never
    case .concatenation:
      var result = concatenation(derivative(node.a, byte), node.b)
      let first = acceptance[Int(node.a)]
      if first != 0 {
        let rest = derivative(node.b, byte)
        for tag in acceptanceSets[Int(first)] {
          result = union(result, tag == Self.untagged ? rest : tagged(rest, tag))
        }
      }
      return result
    case .union:
      var parts: [RegularState] = []
      for index in Int(node.a)..<Int(node.a + node.b) {
        let part = derivative(pool[index], byte)
        if part != Self.never { parts.append(part) }
      }
      return parts.count == 1 ? parts[0] : union(parts)
    case .intersection:
      var parts: [RegularState] = []
      for index in Int(node.a)..<Int(node.a + node.b) {
        let part = derivative(pool[index], byte)
        if part == Self.never { return Self.never }
        parts.append(part)
      }
      return intersection(parts)
    case .complement: return complement(derivative(node.a, byte))
    case .repetition:
      let rest = derivative(node.a, byte)
      if rest == Self.never { return Self.never }
      return concatenation(rest, repetition(node.a, max(node.b - 1, 0), node.c < 0 ? -1 : node.c - 1))
    case .tagged: return tagged(derivative(node.a, byte), node.b)
    case .nonEmpty: return derivative(node.a, byte)
    case .escaped:
      if byte == 0x5C { return pending(node.a, Place.backslash, 0) }
      if byte < 0x20 || byte == 0x22 { return Self.never }
      return escaped(derivative(node.a, byte))
    case .pending: return pendingDerivative(node, byte)
    case .keys:
      guard let child = tries[Int(node.a)].child(of: node.b, byte) else { return Self.never }
      return keys(trie: node.a, node: child, names: node.c == 0 ? nil : nameSets[Int(node.c)])
    case .digits:
      if byte == 0x2E { return state }
      guard byte >= 0x30, byte <= 0x39 else { return Self.never }
      return digits(
        multipleOf: Int(node.a), residue: Int32((Int(node.b) * 10 + Int(byte - 0x30)) % Int(node.a)))
    case .search:
      let next = searches[Int(node.a)].next(node.b, byte)
      return next < 0 ? Self.never : search(node.a, next)
    }
  }

  private func pendingDerivative(_ node: Node, _ byte: UInt8) -> RegularState {
    let place = node.b & 3
    let count = node.b >> 2 & 7
    let high = UInt32(node.b >> 8)
    switch place {
    case Place.backslash:
      switch byte {
      case 0x22, 0x5C, 0x2F: return escaped(derivative(node.a, byte))
      case 0x62: return escaped(derivative(node.a, 0x08))
      case 0x66: return escaped(derivative(node.a, 0x0C))
      case 0x6E: return escaped(derivative(node.a, 0x0A))
      case 0x72: return escaped(derivative(node.a, 0x0D))
      case 0x74: return escaped(derivative(node.a, 0x09))
      case 0x75: return pending(node.a, Place.digits, 0)
      default: return Self.never
      }
    case Place.lowBackslash:
      return byte == 0x5C ? pending(node.a, Place.lowMarker | Int32(high) << 8, 0) : Self.never
    case Place.lowMarker:
      return byte == 0x75 ? pending(node.a, Place.digits | Int32(high) << 8, 0) : Self.never
    default:
      guard let digit = Self.hexadecimalDigit(byte) else { return Self.never }
      let value = UInt32(node.c) << 4 | digit
      if count < 3 { return pending(node.a, Place.digits | (count + 1) << 2 | Int32(high) << 8, Int32(value)) }
      if high != 0 {
        guard value >= 0xDC00, value < 0xE000 else { return Self.never }
        return escaped(derivative(node.a, scalar: 0x10000 + (high - 0xD800) << 10 + (value - 0xDC00)))
      }
      if value >= 0xD800, value < 0xDC00 { return pending(node.a, Place.lowBackslash | Int32(value) << 8, 0) }
      if value >= 0xDC00, value < 0xE000 { return Self.never }
      return escaped(derivative(node.a, scalar: value))
    }
  }

  private static func hexadecimalDigit(_ byte: UInt8) -> UInt32? {
    switch byte {
    case 0x30...0x39: UInt32(byte - 0x30)
    case 0x41...0x46: UInt32(byte - 0x41 + 10)
    case 0x61...0x66: UInt32(byte - 0x61 + 10)
    default: nil
    }
  }

  private func derivative(_ state: RegularState, scalar: UInt32) -> RegularState {
    var bytes: [UInt8] = []
    Self.forEachUTF8Range(scalar...scalar) { bytes = $0.map(\.lowerBound) }
    var state = state
    for byte in bytes { state = derivative(state, byte) }
    return state
  }

  // MARK: Rows

  /// Bytes at which successors may change: bit `b` is set if byte `b` may lead elsewhere than `b - 1`.
  private struct Boundaries {
    var words: SIMD4<UInt64> = .zero

    @inline(__always)
    mutating func insert(_ byte: Int) { if byte < 256 { words[byte >> 6] |= 1 << UInt64(byte & 63) } }

    func contains(_ byte: Int) -> Bool { words[byte >> 6] >> UInt64(byte & 63) & 1 != 0 }
  }

  private func collect(_ state: RegularState, _ boundaries: inout Boundaries) {
    if let row = rows[Int(state)] {
      for byte in 1..<256 where row[byte] != row[byte - 1] { boundaries.insert(byte) }
      return
    }
    let node = nodes[Int(state)]
    switch node.kind {
    case .never, .empty, .allBytes: break
    case .branch:
      for index in stride(from: Int(node.a), to: Int(node.a) + Int(node.b) * 3, by: 3) {
        boundaries.insert(Int(pool[index]))
        boundaries.insert(Int(pool[index + 1]) + 1)
      }
    case .concatenation:
      collect(node.a, &boundaries)
      if accepts(node.a) { collect(node.b, &boundaries) }
    case .union, .intersection:
      for index in Int(node.a)..<Int(node.a + node.b) { collect(pool[index], &boundaries) }
    case .complement, .repetition, .tagged, .nonEmpty: collect(node.a, &boundaries)
    case .escaped:
      collect(node.a, &boundaries)
      for byte in [0x20, 0x22, 0x23, 0x5C, 0x5D] { boundaries.insert(byte) }
    case .pending:
      let place = node.b & 3
      let bytes: [UInt8] =
        place == Place.backslash
        ? Array("\"\\/bfnrtu".utf8) : place == Place.digits ? Array("0123456789ABCDEFabcdef".utf8) : Array("\\u".utf8)
      for byte in bytes {
        boundaries.insert(Int(byte))
        boundaries.insert(Int(byte) + 1)
      }
    case .keys:
      for byte in tries[Int(node.a)].childBytes(of: node.b) {
        boundaries.insert(Int(byte))
        boundaries.insert(Int(byte) + 1)
      }
    case .search:
      for byte in searches[Int(node.a)].bytes {
        boundaries.insert(Int(byte))
        boundaries.insert(Int(byte) + 1)
      }
      boundaries.insert(0xF8)
    case .digits: for byte in 0x2E...0x3A { boundaries.insert(byte) }
    }
  }

  /// The successors of a state, one per byte; dead ones are `never`. Valid until rows are dropped.
  @inline(__always)
  func row(_ state: RegularState) -> UnsafeMutablePointer<RegularState> {
    if let row = rows[Int(state)] { return row }
    return makeRow(state)
  }

  /// The successor of a state by one byte; `never` if it is dead.
  @inline(__always)
  func successor(_ state: RegularState, _ byte: UInt8) -> RegularState {
    if let row = rows[Int(state)] { return row[Int(byte)] }
    return findSuccessor(state, byte)
  }

  @inline(never)
  private func findSuccessor(_ state: RegularState, _ byte: UInt8) -> RegularState {
    if visits[Int(state)] >= Self.visitsBeforeRow { return makeRow(state)[Int(byte)] }
    visits[Int(state)] += 1
    let target = derivative(state, byte)
    return target != Self.never && isAlive(target) ? target : Self.never
  }

  /// Whether no byte of some classes leads from a state elsewhere, as far as that is known without work.
  @inline(__always)
  func isKnownToLoop(_ state: RegularState, _ classes: UInt64) -> Bool {
    rows[Int(state)] != nil && classes & ~loopClasses(state) == 0
  }

  /// The classes of bytes (`ByteClass`) all of whose bytes lead from a state to itself: below a node of the token tree that
  /// has no others, nothing changes.
  @inline(__always)
  func loopClasses(_ state: RegularState) -> UInt64 {
    let known = loops[Int(state)]
    return known != Self.unknownLoops ? known : findLoopClasses(state)
  }

  private func findLoopClasses(_ state: RegularState) -> UInt64 {
    let row = row(state)
    var leaving: UInt64 = 0
    for byte in 0..<256 where row[byte] != state { leaving |= ByteClass.bits[byte] }
    let result = ByteClass.all & ~leaving
    loops[Int(state)] = result
    return result
  }

  @inline(never)
  private func makeRow(_ state: RegularState) -> UnsafeMutablePointer<RegularState> {
    let row = UnsafeMutablePointer<RegularState>.allocate(capacity: 256)
    row.initialize(repeating: 0, count: 256)
    var boundaries = Boundaries()
    collect(state, &boundaries)
    var byte = 0
    while byte < 256 {
      var end = byte + 1
      while end < 256, !boundaries.contains(end) { end += 1 }
      let target = derivative(state, UInt8(byte))
      if target != Self.never, isAlive(target) {
        (row + byte).update(repeating: target, count: end - byte)
      }
      byte = end
    }
    // A liveness check may have asked for the same row.
    if let other = rows[Int(state)] {
      row.deallocate()
      return other
    }
    rows[Int(state)] = row
    rowCount += 1
    if rowCount > Self.maximumRows * 8 { overflowed("one step visits more than \(Self.maximumRows * 8) states") }
    return row
  }

  // MARK: Liveness

  /// Whether a state accepts any text.
  func isAlive(_ state: RegularState) -> Bool {
    let node = nodes[Int(state)]
    if node.liveness != 0 { return node.liveness == 1 }
    let result: Bool
    switch node.kind {
    case .never: result = false
    case .empty, .allBytes, .keys, .search, .digits: result = true
    case .branch:
      var any = false
      for index in stride(from: Int(node.a) + 2, to: Int(node.a) + Int(node.b) * 3, by: 3) where isAlive(pool[index]) {
        any = true
        break
      }
      result = any
    case .concatenation: result = isAlive(node.a) && isAlive(node.b)
    case .union:
      var any = false
      for index in Int(node.a)..<Int(node.a + node.b) where isAlive(pool[index]) {
        any = true
        break
      }
      result = any
    case .repetition: result = node.b == 0 || isAlive(node.a)
    case .tagged, .escaped: result = isAlive(node.a)
    case .pending: result = isPendingAlive(node)
    case .intersection, .complement, .nonEmpty: return explore(state)
    }
    nodes[Int(state)].liveness = result ? 1 : 2
    return result
  }

  /// Looks for an accepting state behind a state.
  private func explore(_ start: RegularState) -> Bool {
    var parents: [RegularState: RegularState] = [start: -1]
    var stack = [start]
    var visited = 0
    while let state = stack.popLast() {
      var found = acceptance[Int(state)] != 0 || nodes[Int(state)].liveness == 1
      if !found, state != start {
        // What is not itself a condition is decided by its parts.
        switch nodes[Int(state)].kind {
        case .intersection, .complement, .nonEmpty: break
        default: if isDecided(state) { found = isAlive(state) }
        }
      }
      if found {
        var current = state
        while current >= 0 {
          nodes[Int(current)].liveness = 1
          current = parents[current]!
        }
        return true
      }
      visited += 1
      if visited > Self.maximumExploration {
        overflowed("whether its conditions can be met at once takes more than \(Self.maximumExploration) states to see")
        return false
      }
      var boundaries = Boundaries()
      collect(state, &boundaries)
      var byte = 0
      var last: RegularState = -1
      while byte < 256 {
        if byte == 0 || boundaries.contains(byte) {
          let target = derivative(state, UInt8(byte))
          if target != Self.never, target != last, nodes[Int(target)].liveness != 2, parents[target] == nil {
            parents[target] = state
            stack.append(target)
          }
          last = target
        }
        byte += 1
      }
    }
    for state in parents.keys { nodes[Int(state)].liveness = 2 }
    return false
  }

  /// Whether a state holds no condition whose liveness is unknown, so that asking does not explore again.
  private func isDecided(_ state: RegularState) -> Bool {
    let node = nodes[Int(state)]
    if node.liveness != 0 { return true }
    switch node.kind {
    case .never, .empty, .allBytes, .keys, .search, .digits: return true
    case .concatenation: return isDecided(node.a) && isDecided(node.b)
    case .union:
      for index in Int(node.a)..<Int(node.a + node.b) where !isDecided(pool[index]) { return false }
      return true
    case .branch:
      for index in stride(from: Int(node.a) + 2, to: Int(node.a) + Int(node.b) * 3, by: 3)
      where !isDecided(pool[index]) { return false }
      return true
    case .repetition, .tagged, .escaped: return isDecided(node.a)
    case .intersection, .complement, .nonEmpty, .pending: return false
    }
  }

  private func isPendingAlive(_ node: Node) -> Bool {
    let place = node.b & 3
    let count = UInt32(node.b >> 2 & 7)
    let high = UInt32(node.b >> 8)
    switch place {
    case Place.backslash:
      for scalar: UInt32 in [0x22, 0x5C, 0x2F, 0x08, 0x0C, 0x0A, 0x0D, 0x09]
      where isAlive(derivative(node.a, scalar: scalar)) {
        return true
      }
      return acceptsAnyScalar(node.a, 0...0x10FFFF)
    case Place.lowBackslash, Place.lowMarker:
      let first = 0x10000 + (high - 0xD800) << 10
      return acceptsAnyScalar(node.a, first...(first + 0x3FF))
    default:
      let shift = 4 * (4 - count)
      let low = UInt32(node.c) << shift
      let last = low + (1 << shift) - 1
      if high != 0 {
        let from = max(low, 0xDC00)
        let to = min(last, 0xDFFF)
        if from > to { return false }
        let base = 0x10000 + (high - 0xD800) << 10
        return acceptsAnyScalar(node.a, (base + from - 0xDC00)...(base + to - 0xDC00))
      }
      if acceptsAnyScalar(node.a, low...last) { return true }
      // A high surrogate may be on its way.
      let from = max(low, 0xD800)
      let to = min(last, 0xDBFF)
      if from > to { return false }
      return acceptsAnyScalar(node.a, (0x10000 + (from - 0xD800) << 10)...(0x10000 + (to - 0xD800) << 10 + 0x3FF))
    }
  }

  /// Whether some scalar of a range may follow.
  private func acceptsAnyScalar(_ state: RegularState, _ range: ClosedRange<UInt32>) -> Bool {
    var found = false
    Self.forEachUTF8Range(range) { bytes in if !found { found = acceptsAny(state, bytes[...]) } }
    return found
  }

  private func acceptsAny(_ state: RegularState, _ bytes: ArraySlice<ClosedRange<UInt8>>) -> Bool {
    guard let range = bytes.first else { return true }
    let row = row(state)
    var last: RegularState = 0
    for byte in range {
      let target = row[Int(byte)]
      if target == last || target == Self.never { continue }
      last = target
      if acceptsAny(target, bytes.dropFirst()) { return true }
    }
    return false
  }

  // MARK: Spelling

  /// Whether a backslash at a state begins nothing but another spelling of what can be written without one.
  func isEscapeRedundant(_ state: RegularState) -> Bool {
    let node = nodes[Int(state)]
    switch node.kind {
    case .escaped:
      for scalar in Array(UInt8(0)..<0x20) + [0x22, 0x5C] {
        let target = derivative(node.a, scalar)
        if target != Self.never, isAlive(target) { return false }
      }
      return true
    case .concatenation: return isEscapeRedundant(node.a) && (!accepts(node.a) || isEscapeRedundant(node.b))
    case .union:
      for index in Int(node.a)..<Int(node.a + node.b) where !isEscapeRedundant(pool[index]) { return false }
      return true
    case .tagged, .nonEmpty: return isEscapeRedundant(node.a)
    default:
      let target = derivative(state, 0x5C)
      return target == Self.never || !isAlive(target)
    }
  }

  // MARK: Relaxed counts

  /// The state with counts of `least` or more replaced by no limit and minima by none: the same but for texts that come
  /// near a limit.
  func relaxed(_ state: RegularState, least: Int32) -> RegularState {
    let found = relaxedStates[Int(state)]
    if found != Self.unknown { return found }
    let node = nodes[Int(state)]
    let result: RegularState
    switch node.kind {
    case .concatenation: result = concatenation(relaxed(node.a, least: least), relaxed(node.b, least: least))
    case .repetition where scalarSets.contains(node.a) || node.a == utf8Scalar:
      result = node.c >= 0 && node.c < least ? state : repetition(node.a, 0, -1)
    case .tagged: result = tagged(relaxed(node.a, least: least), node.b)
    case .escaped: result = escaped(relaxed(node.a, least: least))
    case .nonEmpty: result = relaxed(node.a, least: least)
    default: result = state
    }
    relaxedStates[Int(state)] = result
    return result
  }

  /// The least count that `relaxed` gives up: texts of at most this many bytes do not tell the two apart, provided
  /// minima are none. `nil` if a minimum was given up, too.
  func slack(_ state: RegularState, least: Int32) -> Int32? {
    let known = slacks[Int(state)]
    if known != Self.unknown { return known < 0 ? nil : known }
    let result = computedSlack(state, least: least)
    slacks[Int(state)] = result ?? -1
    return result
  }

  private func computedSlack(_ state: RegularState, least: Int32) -> Int32? {
    let node = nodes[Int(state)]
    switch node.kind {
    case .concatenation:
      guard let left = slack(node.a, least: least), let right = slack(node.b, least: least) else { return nil }
      return min(left, right)
    case .repetition where scalarSets.contains(node.a) || node.a == utf8Scalar:
      if node.b > 0 { return node.c >= 0 && node.c < least ? .max : nil }
      return node.c < 0 || node.c < least ? .max : node.c
    case .tagged, .escaped: return slack(node.a, least: least)
    case .nonEmpty: return nil
    default: return .max
    }
  }
}

/// Hash to number, open addressing.
struct InternTable {
  private struct Entry {
    var low: UInt64
    var high: UInt64
    var value: Int32
  }

  private var entries: ContiguousArray<Entry>
  private var mask: Int
  private var count = 0

  init(capacity: Int) {
    entries = ContiguousArray(repeating: Entry(low: 0, high: 0, value: -1), count: capacity)
    mask = capacity - 1
  }

  /// Where a key is or would go.
  func find(_ low: UInt64, _ high: UInt64) -> Int {
    var slot = Int(truncatingIfNeeded: low) & mask
    entries.withUnsafeBufferPointer { entries in
      while entries[slot].value >= 0, entries[slot].low != low || entries[slot].high != high {
        slot = (slot + 1) & mask
      }
    }
    return slot
  }

  func value(at slot: Int) -> Int32? { entries[slot].value >= 0 ? entries[slot].value : nil }

  mutating func insert(_ low: UInt64, _ high: UInt64, _ value: Int32, at slot: Int) {
    entries[slot] = Entry(low: low, high: high, value: value)
    count += 1
    guard count * 2 > entries.count else { return }
    var larger = InternTable(capacity: entries.count * 2)
    for entry in entries where entry.value >= 0 {
      larger.insert(entry.low, entry.high, entry.value, at: larger.find(entry.low, entry.high))
    }
    self = larger
  }
}

/// Bytes in classes, so that the bytes below a node of the token tree are 64 bits: ASCII punctuation one by one, letters and
/// digits by what patterns usually tell apart, other bytes by their place in UTF-8.
enum ByteClass {
  /// The class of each byte, as a bit.
  static let bits: [UInt64] = {
    var next: UInt64 = 1
    var bits = [UInt64](repeating: 0, count: 256)
    func add(_ bytes: some Sequence<Int>) {
      for byte in bytes { bits[byte] = next }
      next <<= 1
    }
    for byte in [0x09, 0x0A, 0x0D] { add([byte]) }
    for byte in 0x20..<0x7F where !(0x30...0x39).contains(byte) && !(0x41...0x5A).contains(byte & ~0x20) { add([byte]) }
    for letters in [0x41...0x46, 0x47...0x5A, 0x61...0x66, 0x67...0x7A] { add(letters) }
    add(0x30...0x39)
    add((0x00...0x1F).filter { ![0x09, 0x0A, 0x0D].contains($0) } + [0x7F])
    add(0x80...0xBF)
    add(0xC2...0xDF)
    add(0xE0...0xEF)
    add(0xF0...0xF4)
    add([0xC0, 0xC1] + Array(0xF5...0xFF))
    return bits
  }()

  /// All classes.
  static let all: UInt64 = bits.reduce(0, |)
}
