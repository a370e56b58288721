/// Text to measure tokenizers with: drawn at random, with the word frequencies of natural text, so that no two seeds give
/// the same text.
package enum TokenizerTextKind: String, CaseIterable, Sendable {
  /// Prose: frequent and rare words, inflected forms, names, numbers, punctuation.
  case english
  /// Programs: indentation, identifiers in both cases, operators, literals.
  case code
  /// Chinese prose without spaces, some digits and Latin words.
  case chinese
  /// Words that never come back, so that no memory of words helps.
  case unique

  /// A text of about `size` bytes.
  package func text(size: Int, seed: UInt64) -> String {
    var writer = TextWriter(seed: seed)
    while writer.text.utf8.count < size {
      switch self {
      case .english: writer.sentence()
      case .code: writer.function()
      case .chinese: writer.chineseSentence()
      case .unique: writer.uniqueLine()
      }
    }
    return writer.text
  }
}

private struct TextWriter {
  var text = ""
  private var generator: SeededGenerator
  private var indentation = 0

  init(seed: UInt64) { generator = SeededGenerator(seed: seed) }

  private static let small = [
    "the", "of", "and", "to", "a", "in", "is", "it", "that", "was", "for", "on", "with", "as", "be", "at", "by", "this",
    "had", "not", "are", "but", "from", "or", "have", "an", "they", "which", "you", "were", "her", "all", "she",
    "there",
    "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said",
    "what",
    "up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some", "could", "time", "these",
    "two",
    "may", "then", "do", "first", "any", "my", "now", "such", "like", "our", "over", "even", "most", "after", "also",
    "don't", "it's", "they're", "we've", "I'm", "couldn't",
  ]
  private static let stems = [
    "act", "account", "adapt", "agree", "allow", "appear", "argue", "arrange", "assign", "attach", "balance", "begin",
    "bind", "board", "bound", "build", "call", "capture", "cast", "change", "charge", "check", "claim", "class",
    "clear",
    "close", "cloud", "collect", "color", "command", "commit", "compare", "compose", "compute", "connect", "consider",
    "construct", "contain", "content", "control", "copy", "count", "cover", "create", "cross", "current", "decide",
    "define", "deliver", "depend", "describe", "design", "detect", "develop", "differ", "direct", "discover", "discuss",
    "divide", "document", "doubt", "draw", "employ", "engine", "enter", "equal", "establish", "estimate", "examine",
    "exchange", "expect", "explain", "express", "extend", "field", "figure", "filter", "final", "flow", "follow",
    "force",
    "form", "frame", "friend", "garden", "gather", "govern", "grow", "handle", "harbor", "history", "house", "imagine",
    "improve", "include", "index", "inform", "inspect", "invent", "involve", "island", "journey", "judge", "keep",
    "language", "learn", "letter", "light", "limit", "listen", "local", "machine", "manage", "market", "master",
    "matter",
    "measure", "member", "memory", "merchant", "message", "model", "moment", "morning", "motion", "mountain", "move",
    "nation", "network", "night", "notice", "number", "object", "observe", "offer", "open", "operate", "order",
    "organize", "paper", "parse", "particle", "pattern", "perform", "person", "picture", "place", "plan", "point",
    "position", "possess", "predict", "prepare", "present", "press", "prevent", "process", "produce", "promise",
    "protect", "provide", "publish", "question", "quick", "reach", "read", "reason", "receive", "record", "reduce",
    "reflect", "regard", "region", "relate", "release", "remember", "render", "repeat", "report", "request", "require",
    "resolve", "respond", "result", "return", "river", "round", "sample", "scale", "schedule", "science", "season",
    "select", "send", "separate", "serve", "settle", "shape", "signal", "simple", "society", "solve", "sort", "sound",
    "source", "speak", "spirit", "stand", "start", "state", "station", "store", "stream", "strength", "structure",
    "study", "subject", "suggest", "support", "surface", "system", "table", "teach", "temper", "theory", "thought",
    "token", "tower", "trade", "train", "transform", "travel", "treat", "understand", "update", "value", "vector",
    "village", "visit", "voice", "water", "weather", "winter", "wonder", "work", "write", "yield",
  ]
  private static let prefixes = ["", "", "", "", "", "", "re", "un", "over", "under", "inter", "pre", "dis", "out"]
  private static let suffixes = [
    "", "", "", "s", "ed", "ing", "er", "ers", "able", "ment", "ly", "ness", "ful", "ation",
  ]
  private static let characters = Array(
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文"
      + "无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问力机给等几很"
      + "业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加化由却代军产入先山五太水万市眼体别处总才场师书比住员九笑性通目华报立马命"
      + "张活难神数件安表原车白应路期叫死常提感金何更反合放做系计或司利受光王果亲界及今京务制解各任至清物台象记边共风战干接它许八特觉望直服毛林题建南度统色字"
      + "请交爱让认算论百吃义科怎元社术结六功指思非流每青管夫连远资队跟带花快条院变联言权往展该领传近留红治决周保达办运武半候七必城父强步完革深区即求品士转量")

  // MARK: Draws

  private mutating func below(_ limit: Int) -> Int { Int.random(in: 0..<limit, using: &generator) }

  /// An index whose frequency falls with its rank, as words' frequencies do.
  private mutating func ranked(_ count: Int) -> Int {
    let exponent = generator.uniform()
    var rank = 1.0
    // count to the power of a uniform number is log-uniform: the density falls as one over the rank.
    var base = Double(count)
    var remaining = exponent
    for _ in 0..<24 {
      base = base.squareRoot()
      remaining *= 2
      if remaining >= 1 {
        rank *= base
        remaining -= 1
      }
    }
    return Swift.min(count - 1, Int(rank) - 1)
  }

  private mutating func pick(_ words: [String]) -> String { words[below(words.count)] }

  private mutating func derived() -> String {
    // The same stem comes with the same affixes most of the time.
    let index = ranked(Self.stems.count * 400)
    let stem = Self.stems[index % Self.stems.count]
    let form = index / Self.stems.count
    return Self.prefixes[form * 7 % Self.prefixes.count] + stem + Self.suffixes[form * 5 % Self.suffixes.count]
      + (form >= 196 ? "-" + Self.stems[form * 11 % Self.stems.count] : "")
  }

  private mutating func word() -> String {
    if generator.uniform() < 0.5 { return Self.small[ranked(Self.small.count)] }
    return derived()
  }

  private func capitalized(_ word: String) -> String { word.prefix(1).uppercased() + word.dropFirst() }

  // MARK: Texts

  mutating func sentence() {
    let length = 4 + below(20)
    for index in 0..<length {
      var next = word()
      switch below(60) {
      case 0: next = String(below(100_000))
      case 1: next = "\(below(1000)).\(below(100))%"
      case 2: next = capitalized(derived())
      case 3: next = "(" + next + ")"
      case 4: next = "\"" + next + "\""
      default: break
      }
      text += index == 0 ? capitalized(next) : next
      if index + 1 < length { text += below(12) == 0 ? ", " : " " }
    }
    text += [". ", ". ", ". ", "? ", "; ", ".\n\n"][below(6)]
  }

  private mutating func identifier() -> String {
    let parts = (0...below(3)).map { _ in derived().replacing("-", with: "_") }
    return below(2) == 0
      ? parts.joined(separator: "_")
      : parts[0] + parts.dropFirst().map { capitalized($0) }.joined()
  }

  private mutating func operand() -> String {
    switch below(6) {
    case 0: String(below(1000))
    case 1: "\"\(derived()) \(derived())\""
    case 2: "\(identifier())[\(below(16))]"
    case 3: "\(identifier())(\(identifier()), \(below(10)))"
    default: identifier()
    }
  }

  mutating func function() {
    text += "def \(identifier())(self, \(identifier()), \(identifier())=\(below(100))):\n"
    text += "    \"\"\"\(capitalized(word())) \(word()) \(word()) \(word()).\"\"\"\n"
    var depth = 1
    for _ in 0..<(3 + below(10)) {
      text += String(repeating: "    ", count: depth)
      switch below(6) {
      case 0 where depth < 4:
        text += "if \(operand()) \(pick(["==", "<", ">=", "!=", "in", "is not"])) \(operand()):\n"
        depth += 1
        continue
      case 1 where depth < 4:
        text += "for \(identifier()) in \(operand()):\n"
        depth += 1
        continue
      case 2: text += "return \(operand())\n"
      case 3: text += "self.\(identifier()) += \(operand())  # \(word()) \(word())\n"
      default: text += "\(identifier()) = \(operand()) \(pick(["+", "-", "*", "//", "and", "or", "%"])) \(operand())\n"
      }
      if depth > 1, below(3) == 0 { depth -= 1 }
    }
    text += "\n\n"
  }

  mutating func chineseSentence() {
    let length = 8 + below(30)
    for index in 0..<length {
      text.append(Self.characters[ranked(Self.characters.count)])
      if index % 9 == 8 { text += "，" }
      switch below(80) {
      case 0: text += String(below(10_000))
      case 1: text += capitalized(derived())
      default: break
      }
    }
    text += ["。", "。", "。", "？", "！", "。\n"][below(6)]
  }

  mutating func uniqueLine() {
    for _ in 0..<10 {
      var letters = ""
      for _ in 0..<(3 + below(9)) { letters.append(Character(Unicode.Scalar(UInt8(97 + below(26))))) }
      text += letters + " "
    }
    text += "\n"
  }
}
