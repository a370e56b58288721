import ApusCore

extension FinishReason {
  /// `finish_reason` of the OpenAI API; an aborted request says `abort`, as SGLang's does.
  var openAIName: String {
    switch self {
    case .stop: "stop"
    case .length: "length"
    case .abort: "abort"
    }
  }

  /// `finish_reason` of a chat choice: an answer with tool calls that ended by itself ended for their sake.
  func openAIName(hasCalls: Bool) -> String {
    if hasCalls, case .stop = self { "tool_calls" } else { openAIName }
  }

  /// What a stop condition matched: a token's id, a text, or nothing.
  var matched: JSONValue {
    switch self {
    case .stop(.token(let token)): .int(Int64(token))
    case .stop(.text(let text)): .string(text)
    default: .null
    }
  }
}

/// Adds up the usage of the generations of one HTTP request.
///
/// A prompt counts once, however many samples were drawn from it.
struct UsageTotal {
  private var usages: [Usage]
  /// Tokens of the chains of thought that were told apart, each known when its answer has ended; `nil` before the first.
  private var reasoningTokens: Int?
  private let samplesPerPrompt: Int

  init(count: Int, samplesPerPrompt: Int) {
    usages = Array(repeating: Usage(), count: count)
    self.samplesPerPrompt = samplesPerPrompt
  }

  /// Takes the counts of a generation so far.
  mutating func update(_ index: Int, _ usage: Usage) { usages[index] = usage }

  /// Takes how many tokens of a generation that has ended were its chain of thought, once for each.
  mutating func setReasoning(_ index: Int, tokens: Int) {
    // The thoughts' text is cut anew, which may give other tokens than were drawn, but is never said to be more.
    reasoningTokens = (reasoningTokens ?? 0) + min(tokens, usages[index].completionTokens)
  }

  /// Writes the `usage` object.
  func write(to writer: inout JSONWriter) {
    var total = Usage()
    for (index, usage) in usages.enumerated() {
      total.completionTokens += usage.completionTokens
      if index % samplesPerPrompt == 0 {
        total.promptTokens += usage.promptTokens
        total.cachedTokens += usage.cachedTokens
      }
      if let counts = usage.speculation { total.speculation = (total.speculation ?? SpeculationCounts()) + counts }
    }
    writer.object { writer in
      writer.member("prompt_tokens", total.promptTokens)
      writer.member("completion_tokens", total.completionTokens)
      writer.member("total_tokens", total.promptTokens + total.completionTokens)
      writer.key("prompt_tokens_details")
      writer.object { $0.member("cached_tokens", total.cachedTokens) }
      if total.speculation == nil, reasoningTokens == nil { return }
      writer.key("completion_tokens_details")
      writer.object { writer in
        if let reasoningTokens { writer.member("reasoning_tokens", reasoningTokens) }
        if let counts = total.speculation {
          writer.member("accepted_prediction_tokens", counts.acceptedTokens)
          writer.member("rejected_prediction_tokens", counts.draftTokens - counts.acceptedTokens)
        }
      }
    }
  }
}

/// The members that every object of one response begins with.
struct ResponseHead: Sendable {
  var id: String
  var object: String
  var created: Int
  var model: String
  var systemFingerprint: String

  func write(to writer: inout JSONWriter) {
    writer.member("id", id)
    writer.member("object", object)
    writer.member("created", created)
    writer.member("model", model)
    writer.member("system_fingerprint", systemFingerprint)
  }
}

extension ServerState {
  /// Writes log-probabilities in the shape of the chat API: `{"content": [...]}`.
  func writeChatLogprobs(_ positions: [PositionLogprobs], to writer: inout JSONWriter) {
    writer.object { writer in
      writer.key("content")
      writer.array { writer in for position in positions { writeLogprobs(position, to: &writer) } }
    }
  }

  /// Writes the log-probabilities at one position as an entry of the chat and of the responses API.
  func writeLogprobs(_ position: PositionLogprobs, to writer: inout JSONWriter) {
    func members(_ entry: TokenLogprob, _ writer: inout JSONWriter) {
      let (bytes, text) = self.text(of: entry.token)
      writer.member("token", text)
      writer.key("logprob")
      writer.value(entry.logprob)
      writer.key("bytes")
      writer.array { writer in for byte in bytes { writer.value(Int(byte)) } }
    }
    writer.object { writer in
      members(position.chosen, &writer)
      writer.key("top_logprobs")
      writer.array { writer in for entry in position.top { writer.object { members(entry, &$0) } } }
    }
  }

  /// Writes log-probabilities in the shape of the completions API: four parallel lists.
  ///
  /// - Parameter offset: where the first token's text begins, counted in characters of the choice's text (Unicode
  ///   scalars, as Python counts); moved to the end of the last one's.
  func writeCompletionLogprobs(_ positions: [PositionLogprobs], offset: inout Int, to writer: inout JSONWriter) {
    let texts = positions.map { completionText(of: $0.chosen.token) }
    var offsets: [Int] = []
    for position in positions {
      offsets.append(offset)
      offset += text(of: position.chosen.token).text.unicodeScalars.count
    }
    writer.object { writer in
      writer.key("text_offset")
      writer.array { writer in for offset in offsets { writer.value(offset) } }
      writer.key("token_logprobs")
      writer.array { writer in for position in positions { writer.value(position.chosen.logprob) } }
      writer.key("tokens")
      writer.array { writer in for text in texts { writer.value(text) } }
      writer.key("top_logprobs")
      writer.array { writer in
        for position in positions {
          // The first token of a prompt has no distribution to report.
          if position.chosen.logprob == nil {
            writer.null()
            continue
          }
          writer.object { writer in
            var seen: Set<String> = []
            // The chosen token is always among them, as OpenAI's API has it. An object cannot hold one key twice: of
            // two tokens with the same text, the likelier stays.
            for entry in position.top + [position.chosen] {
              let text = completionText(of: entry.token)
              guard seen.insert(text).inserted else { continue }
              writer.key(text)
              writer.value(entry.logprob)
            }
          }
        }
      }
    }
  }

  /// A token's text as the completions API spells it: bytes that are no whole characters as `bytes:\xe2\x96`.
  private func completionText(of token: TokenID) -> String {
    let bytes = service.tokenBytes(token)
    if let text = String(validating: bytes, as: UTF8.self) { return text }
    return "bytes:" + bytes.map { "\\x" + hexadecimal(UInt64($0)).suffix(2) }.joined()
  }
}

extension JSONWriter {
  /// Writes a number or `null`.
  mutating func value(_ value: Float?) {
    if let value { self.value(value) } else { null() }
  }
}
