import ApusCore

/// Looks for stop patterns in a text that arrives in pieces. Not wired to a regex engine yet: a pattern is refused.
struct StopPatternMatcher: Sendable {
  init(patterns: [String], keepsMatch: Bool) throws(EngineError) {
    if !patterns.isEmpty {
      throw EngineError(.unsupported, "stop_regex is not supported yet.", parameter: "stop_regex")
    }
  }

  mutating func append(_ text: String) -> (text: String, match: String?) { (text, nil) }

  mutating func finish(after text: String) -> String { text }
}
