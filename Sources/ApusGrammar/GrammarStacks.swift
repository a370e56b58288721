/// A terminal under way, and the stack of what follows it.
struct GrammarThread: Equatable {
  var state: RegularState
  var stack: Int32
}

/// The stacks of one matcher: trees of pending work that share their lower parts, each held once. Stack 0 is empty: the end
/// of the text.
///
/// A stack's closure is the set of terminals that can come next when it resumes. Closures are kept, so that a step costs a
/// look into a row of the terminal's automaton and little else.
struct GrammarStacks {
  /// Nested regions at most. Deeper ones are not offered.
  static let maximumDepth: Int32 = 4096
  /// Terminals under way at once at most.
  static let maximumThreads = 2048

  /// What an object or array under way waits for, in the low bits of an item's argument; the rest names its state.
  enum Phase {
    static let open: Int32 = 0
    static let next: Int32 = 1
    static let choosing: Int32 = 2
  }

  struct Item {
    var node: Int32
    var argument: Int32
    var parent: Int32
    var depth: Int32
    var hash: RegularStore.Hash128
  }

  struct Closure {
    var first: Int32
    var count: Int32
    /// Whether the text may end here.
    var canEnd: Bool
    /// Bytes with which some terminal can begin; computed when first asked for.
    var firstBytes: SIMD4<UInt64>?
    /// Whether terminals were left out because there are too many.
    var isTruncated = false
  }

  private(set) var items: [Item] = [
    Item(node: -1, argument: 0, parent: -1, depth: 0, hash: RegularStore.Hash128(17, 19))
  ]
  private var itemTable = InternTable(capacity: 64)
  var closures: [Closure] = []
  private(set) var threads: [GrammarThread] = []
  /// Closure of a stack that resumes after a terminal without tag, or -1.
  private var plainClosures: [Int32] = [-1]
  private var taggedClosures: [UInt64: Int32] = [:]
  private var objectStates: [ObjectProgram.State] = []
  private var objectHashes: [UInt64] = []
  private var objectIndex: [ObjectProgram.State: Int32] = [:]
  /// Set by a step that would have led to more threads than are followed; whoever steps looks and resets.
  var exceededThreads = false

  var count: Int { items.count }

  // MARK: Items

  /// - Parameter content: what the argument means, if it is a number of this matcher's own: stacks of other matchers of the
  ///   grammar that mean the same must have the same hash.
  private mutating func push(_ node: Int32, _ argument: Int32, _ parent: Int32, content: UInt64? = nil) -> Int32 {
    let below = items[Int(parent)]
    if below.depth >= Self.maximumDepth { return -1 }
    var hash = below.hash
    hash.combine(
      UInt64(UInt32(bitPattern: node)) << 32 | UInt64(UInt32(bitPattern: argument & (content == nil ? -1 : 3))))
    if let content { hash.combine(content) }
    let slot = itemTable.find(hash.low, hash.high)
    if let found = itemTable.value(at: slot) { return found }
    let id = Int32(items.count)
    items.append(Item(node: node, argument: argument, parent: parent, depth: below.depth + 1, hash: hash))
    plainClosures.append(-1)
    itemTable.insert(hash.low, hash.high, id, at: slot)
    return id
  }

  private mutating func pushObject(_ node: Int32, _ state: ObjectProgram.State, _ phase: Int32, _ parent: Int32)
    -> Int32
  {
    let id: Int32
    if let found = objectIndex[state] {
      id = found
    } else {
      id = Int32(objectStates.count)
      objectStates.append(state)
      objectIndex[state] = id
      var hash = RegularStore.Hash128(23, 29)
      for word in state.seen { hash.combine(word) }
      hash.combine(UInt64(UInt32(bitPattern: state.count)) << 32 | UInt64(UInt32(bitPattern: state.last)))
      objectHashes.append(hash.low)
    }
    return push(node, id << 2 | phase, parent, content: objectHashes[Int(id)])
  }

  /// Takes over threads with their stacks, and nothing else.
  mutating func adopt(_ threads: [GrammarThread], from other: GrammarStacks) -> [GrammarThread] {
    objectStates = other.objectStates
    objectIndex = other.objectIndex
    objectHashes = other.objectHashes
    var known: [Int32: Int32] = [0: 0]
    return threads.map { thread in
      var path: [Int32] = []
      var current = thread.stack
      while known[current] == nil {
        path.append(current)
        current = other.items[Int(current)].parent
      }
      var parent = known[current]!
      for stack in path.reversed() {
        let item = other.items[Int(stack)]
        let id = Int32(items.count)
        items.append(
          Item(node: item.node, argument: item.argument, parent: parent, depth: item.depth, hash: item.hash))
        plainClosures.append(-1)
        itemTable.insert(item.hash.low, item.hash.high, id, at: itemTable.find(item.hash.low, item.hash.high))
        known[stack] = id
        parent = id
      }
      return GrammarThread(state: thread.state, stack: parent)
    }
  }

  // MARK: Closures

  /// A closure being collected.
  private struct Collection {
    var threads: [GrammarThread] = []
    var canEnd = false
    var visited: [UInt64] = []
    var visitedSet: Set<UInt64> = []
    var threadSet: Set<UInt64> = []

    mutating func visit(_ key: UInt64) -> Bool {
      if visited.count < 24 {
        if visited.contains(key) { return false }
        visited.append(key)
        if visited.count == 24 { visitedSet = Set(visited) }
        return true
      }
      return visitedSet.insert(key).inserted
    }

    mutating func add(_ thread: GrammarThread) {
      if threads.count < 16 {
        if threads.contains(thread) { return }
        threads.append(thread)
        return
      }
      if threadSet.isEmpty {
        for thread in threads { threadSet.insert(Self.key(thread)) }
      }
      if threadSet.insert(Self.key(thread)).inserted { threads.append(thread) }
    }

    private static func key(_ thread: GrammarThread) -> UInt64 {
      UInt64(UInt32(bitPattern: thread.state)) << 32 | UInt64(UInt32(bitPattern: thread.stack))
    }
  }

  private mutating func keep(_ collection: Collection) -> Int32 {
    var collection = collection
    let isTruncated = collection.threads.count > Self.maximumThreads
    if isTruncated {
      collection.threads.removeLast(collection.threads.count - Self.maximumThreads)
    }
    closures.append(
      Closure(
        first: Int32(threads.count), count: Int32(collection.threads.count), canEnd: collection.canEnd,
        isTruncated: isTruncated))
    threads += collection.threads
    return Int32(closures.count - 1)
  }

  /// The closure of the whole grammar.
  mutating func initialClosure(_ program: GrammarProgram) -> Int32 {
    var collection = Collection()
    enter(program.root, 0, program, &collection)
    return keep(collection)
  }

  /// What can come after a terminal that was accepted with a tag.
  mutating func closure(_ stack: Int32, tag: Int32, _ program: GrammarProgram) -> Int32 {
    if tag == RegularStore.untagged {
      let known = plainClosures[Int(stack)]
      if known >= 0 { return known }
      var collection = Collection()
      resume(stack, program, &collection)
      let result = keep(collection)
      plainClosures[Int(stack)] = result
      return result
    }
    let key = UInt64(UInt32(bitPattern: stack)) << 32 | UInt64(UInt32(bitPattern: tag))
    if let known = taggedClosures[key] { return known }
    var collection = Collection()
    let item = items[Int(stack)]
    switch program.nodes[Int(item.node)] {
    case .object(let index): chosen(program.objects[Int(index)], item, tag, program, &collection)
    case .array(let index): chosen(program.arrays[Int(index)], item, tag, program, &collection)
    case .tags(let index): chosen(program.tagPrograms[Int(index)], item, tag, program, &collection)
    default: break
    }
    let result = keep(collection)
    taggedClosures[key] = result
    return result
  }

  /// Adds what comes next when a stack resumes.
  private mutating func resume(_ stack: Int32, _ program: GrammarProgram, _ collection: inout Collection) {
    if stack < 0 { return }
    if stack == 0 {
      collection.canEnd = true
      return
    }
    guard collection.visit(UInt64(UInt32(bitPattern: stack))) else { return }
    let item = items[Int(stack)]
    enter(item.node, item.parent, program, &collection, argument: item.argument)
  }

  /// Adds what comes first when a node is entered, or resumed with an argument.
  private mutating func enter(
    _ node: Int32, _ parent: Int32, _ program: GrammarProgram, _ collection: inout Collection, argument: Int32 = 0
  ) {
    switch program.nodes[Int(node)] {
    case .terminal(let start, let isNullable):
      if start != RegularStore.never { collection.add(GrammarThread(state: start, stack: parent)) }
      if isNullable { resume(parent, program, &collection) }
    case .sequence(let children):
      let next =
        Int(argument) + 1 == children.count ? parent : push(node, argument + 1, parent)
      if next >= 0 { enter(children[Int(argument)], next, program, &collection) }
    case .choice(let children):
      for child in children { enter(child, parent, program, &collection) }
    case .call(let target):
      // Entering again on the same stack adds nothing.
      if collection.visit(1 << 62 | UInt64(UInt32(bitPattern: node)) << 30 ^ UInt64(UInt32(bitPattern: parent))) {
        enter(target, parent, program, &collection)
      }
    case .repetition(let child, let minimum, let maximum):
      // A round that matched nothing leads back here and adds nothing.
      guard collection.visit(1 << 63 | UInt64(UInt32(bitPattern: node)) << 31 ^ UInt64(UInt32(bitPattern: parent)))
      else { return }
      if argument >= minimum { resume(parent, program, &collection) }
      if maximum < 0 {
        let next = push(node, min(argument + 1, minimum), parent)
        if next >= 0 { enter(child, next, program, &collection) }
      } else if argument < maximum {
        let next = argument + 1 == maximum ? parent : push(node, argument + 1, parent)
        if next >= 0 { enter(child, next, program, &collection) }
      }
    case .object(let index):
      let object = program.objects[Int(index)]
      let state = argument == 0 ? object.initial : objectStates[Int(argument >> 2)]
      let choices = object.choices(state)
      let terminal = object.next(choices, isFirst: argument & 3 == Phase.open, program.store)
      let next = pushObject(node, state, Phase.choosing, parent)
      if next >= 0, terminal != RegularStore.never { collection.add(GrammarThread(state: terminal, stack: next)) }
    case .array(let index):
      let array = program.arrays[Int(index)]
      let (place, matches) = Self.arrayState(argument)
      let choices = array.choices(index: place, matches: matches)
      let terminal = array.next(
        item: choices.plain || choices.matching, close: choices.close, isFirst: argument & 3 == Phase.open,
        program.store)
      let next = push(node, argument & ~3 | Phase.choosing, parent)
      if next >= 0, terminal != RegularStore.never { collection.add(GrammarThread(state: terminal, stack: next)) }
    case .tags(let index):
      let tags = program.tagPrograms[Int(index)]
      let next = push(node, Phase.choosing, parent)
      let isBefore = argument == Phase.open
      let text = isBefore ? tags.textBefore : tags.textAfter
      if next >= 0, text != RegularStore.never {
        collection.add(GrammarThread(state: program.store.nonEmpty(text), stack: next))
      }
      if !isBefore || !tags.isRequired { resume(parent, program, &collection) }
    }
  }

  /// Place and matches of an array's argument: two bits of phase, then each in half of the rest.
  private static func arrayState(_ argument: Int32) -> (place: Int32, matches: Int32) {
    (argument >> 2 & 0xFFFF_F, argument >> 22 & 0x1FF)
  }

  private mutating func chosen(
    _ object: ObjectProgram, _ item: Item, _ tag: Int32, _ program: GrammarProgram, _ collection: inout Collection
  ) {
    if tag == MemberTag.close { return resume(item.parent, program, &collection) }
    let state = objectStates[Int(item.argument >> 2)]
    let value: Int32
    let rank: Int
    if tag == MemberTag.additional {
      guard let additional = object.additional else { return }
      (value, rank) = (additional.value, -1)
    } else if tag >= MemberTag.patterns {
      (value, rank) = (object.patterns[Int(tag - MemberTag.patterns)].value, -1)
    } else {
      (value, rank) = (object.values[Int(tag)], Int(tag))
    }
    let after = pushObject(item.node, object.after(state, rank: rank), Phase.next, item.parent)
    guard after >= 0 else { return }
    let stack = push(value, 0, after)
    if stack >= 0 { collection.add(GrammarThread(state: object.colon, stack: stack)) }
  }

  private mutating func chosen(
    _ array: ArrayProgram, _ item: Item, _ tag: Int32, _ program: GrammarProgram, _ collection: inout Collection
  ) {
    if tag == MemberTag.close { return resume(item.parent, program, &collection) }
    let (place, matches) = Self.arrayState(item.argument)
    let choices = array.choices(index: place, matches: matches)
    let element = array.element(at: place)
    for (isPossible, node, counts) in [
      (choices.plain, element.plain, false), (choices.matching, element.matching, true),
    ] where isPossible {
      let next = array.after(index: place, matches: matches, counts: counts)
      let after = push(item.node, next.index << 2 | next.matches << 22 | Phase.next, item.parent)
      if after >= 0 { enter(node, after, program, &collection) }
    }
  }

  private mutating func chosen(
    _ tags: TagsProgram, _ item: Item, _ tag: Int32, _ program: GrammarProgram, _ collection: inout Collection
  ) {
    if tag == TextSearch.endTag { return resume(item.parent, program, &collection) }
    let region = tags.regions[Int(tag)]
    guard region >= 0 else { return }
    let after = tags.stopsAfterFirst ? item.parent : push(item.node, Phase.next, item.parent)
    if after >= 0 { enter(region, after, program, &collection) }
  }

  // MARK: Steps

  /// Appends what a thread becomes by a byte.
  @inline(__always)
  mutating func step(
    _ thread: GrammarThread, _ byte: UInt8, _ program: GrammarProgram, into out: inout [GrammarThread], from first: Int
  ) {
    let store = program.store
    let target = store.successor(thread.state, byte)
    if target != RegularStore.never { append(GrammarThread(state: target, stack: thread.stack), to: &out, from: first) }
    let acceptance = store.acceptance[Int(thread.state)]
    if acceptance == 0 { return }
    if acceptance == 1 {
      stepThrough(closure(thread.stack, tag: RegularStore.untagged, program), byte, program, into: &out, from: first)
      return
    }
    for tag in store.acceptanceSets[Int(acceptance)] {
      stepThrough(closure(thread.stack, tag: tag, program), byte, program, into: &out, from: first)
    }
  }

  private mutating func stepThrough(
    _ index: Int32, _ byte: UInt8, _ program: GrammarProgram, into out: inout [GrammarThread], from first: Int
  ) {
    let closure = closures[Int(index)]
    if closure.isTruncated { exceededThreads = true }
    for index in Int(closure.first)..<Int(closure.first + closure.count) {
      let thread = threads[index]
      let target = program.store.successor(thread.state, byte)
      if target != RegularStore.never {
        append(GrammarThread(state: target, stack: thread.stack), to: &out, from: first)
      }
    }
  }

  @inline(__always)
  private mutating func append(_ thread: GrammarThread, to out: inout [GrammarThread], from first: Int) {
    let count = out.count - first
    if count > 0 {
      for index in first..<out.count where out[index] == thread { return }
      if count >= Self.maximumThreads {
        exceededThreads = true
        return
      }
    }
    out.append(thread)
  }

  /// Whether the text may end after a thread.
  mutating func canEnd(_ thread: GrammarThread, _ program: GrammarProgram) -> Bool {
    let acceptance = program.store.acceptance[Int(thread.state)]
    if acceptance == 0 { return false }
    for tag in program.store.acceptanceSets[Int(acceptance)]
    where closures[Int(closure(thread.stack, tag: tag, program))].canEnd {
      return true
    }
    return false
  }

  /// The bytes with which a closure's terminals can begin.
  mutating func firstBytes(_ index: Int32, _ program: GrammarProgram) -> SIMD4<UInt64> {
    if let known = closures[Int(index)].firstBytes { return known }
    var result = SIMD4<UInt64>.zero
    let closure = closures[Int(index)]
    for index in Int(closure.first)..<Int(closure.first + closure.count) {
      let row = program.store.row(threads[index].state)
      for byte in 0..<256 where row[byte] != RegularStore.never { result[byte >> 6] |= 1 << UInt64(byte & 63) }
    }
    closures[Int(index)].firstBytes = result
    return result
  }
}
