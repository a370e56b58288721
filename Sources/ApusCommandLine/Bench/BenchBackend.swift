import ApusCore
import ArgumentParser
import AsyncHTTPClient

/// The protocol that a benchmark speaks with the server.
enum BenchBackend: String, ExpressibleByArgument, CaseIterable {
  /// Native: POST /generate.
  case apus, sglang
  /// OpenAI's POST /v1/completions.
  case openai, vllm
  /// OpenAI's POST /v1/chat/completions.
  case openaiChat = "openai-chat"

  var isNative: Bool { self == .apus || self == .sglang }
  var path: String {
    switch self {
    case .apus, .sglang: "/generate"
    case .openai, .vllm: "/v1/completions"
    case .openaiChat: "/v1/chat/completions"
    }
  }
  /// Whether prompts may be token ids.
  var takesTokens: Bool { self != .openaiChat }
}

/// Sends one request of a benchmark and times it.
struct BenchSender: Sendable {
  var backend: BenchBackend
  var client: ServerClient
  var model: String
  var units: PromptUnits?
  /// Tokens that the server adds to a prompt of words; as many words fewer are sent.
  var addedTokens: Int
  var temperature: Float
  var ignoresEOS: Bool
  /// Further members of each request's body.
  var extra: JSONObject

  /// The body of a request.
  func body(_ request: BenchRequest) -> [UInt8] {
    var object = JSONObject()
    let prompt: JSONValue
    switch request.prompt {
    case .units(let numbers):
      switch units {
      case .tokens(let ids): prompt = .array(numbers.map { .int(Int64(ids[$0])) })
      case .words, nil:
        prompt = .string(units?.text(Array(numbers.dropLast(min(addedTokens, numbers.count - 1)))) ?? "")
      }
    case .text(let text): prompt = .string(text)
    case .messages(let messages): prompt = messages
    case .tokens(let ids): prompt = .array(ids.map { .int(Int64($0)) })
    }
    if backend.isNative {
      if prompt.stringValue != nil { object["text"] = prompt } else { object["input_ids"] = prompt }
      object["sampling_params"] = .object(
        JSONObject([
          ("temperature", decimal(temperature)), ("max_new_tokens", .int(Int64(request.outputLength))),
          ("ignore_eos", .bool(ignoresEOS)),
        ]))
    } else {
      object["model"] = .string(model)
      if backend == .openaiChat {
        let isConversation = if case .messages = request.prompt { true } else { false }
        object["messages"] = isConversation ? prompt : [["role": "user", "content": prompt]]
      } else {
        object["prompt"] = prompt
      }
      object["max_tokens"] = .int(Int64(request.outputLength))
      object["temperature"] = decimal(temperature)
      if ignoresEOS { object["ignore_eos"] = true }
      object["stream_options"] = ["include_usage": true]
    }
    object["stream"] = true
    for (name, value) in extra { object[name] = value }
    return Array(JSONValue.object(object).compactText.utf8)
  }

  /// Sends a request and records what comes back. Never throws: a failure is part of the record.
  func send(_ body: [UInt8]) async -> BenchRecord {
    var record = BenchRecord()
    record.sent = monotonicSeconds()
    do {
      try await client.streamBytes(backend.path, body: body) { payload in
        let now = monotonicSeconds()
        try note(try JSONValue.parse(payload), at: now, in: &record)
      }
      if record.pieces.isEmpty {
        record.error = "empty answer"
        record.detail = "The stream ended without any output."
      }
    } catch let refusal as ServerRefusal {
      record.error = "HTTP \(refusal.status)"
      record.detail = String(refusal.message.prefix(200))
    } catch let failure as StreamFailure {
      record.error = "error in stream"
      record.detail = failure.message
    } catch let error as HTTPClientError {
      record.error = error.shortDescription
      record.detail = "\(error)"
    } catch is JSONError {
      record.error = "not JSON"
      record.detail = "An event of the stream is not JSON."
    } catch {
      record.error = "connection"
      record.detail = String("\(error)".prefix(200))
    }
    record.ended = monotonicSeconds()
    return record
  }

  private struct StreamFailure: Error { var message: String }

  /// Reads one event of a stream.
  private func note(_ event: JSONValue, at now: Double, in record: inout BenchRecord) throws {
    if let error = event["error"], !error.isNull {
      throw StreamFailure(message: error["message"]?.stringValue ?? error.compactText)
    }
    if backend.isNative {
      let meta = event["meta_info"]
      let tokens = meta?["completion_tokens"]?.intValue ?? record.outputTokens + 1
      record.promptTokens = meta?["prompt_tokens"]?.intValue ?? record.promptTokens
      record.cachedTokens = meta?["cached_tokens"]?.intValue ?? record.cachedTokens
      if meta?["finish_reason"]?["type"]?.stringValue == "abort" {
        throw StreamFailure(message: meta?["finish_reason"]?["message"]?.stringValue ?? "aborted")
      }
      if tokens > record.outputTokens {
        record.pieces.append((now, tokens - record.outputTokens))
        record.outputTokens = tokens
      }
      return
    }
    if let usage = event["usage"], !usage.isNull {
      record.promptTokens = usage["prompt_tokens"]?.intValue ?? record.promptTokens
      record.outputTokens = usage["completion_tokens"]?.intValue ?? record.outputTokens
      record.cachedTokens = usage["prompt_tokens_details"]?["cached_tokens"]?.intValue ?? record.cachedTokens
    }
    guard let choice = event["choices"]?[0] else { return }
    let text =
      backend == .openaiChat
      ? (choice["delta"]?["content"]?.stringValue ?? "") + (choice["delta"]?["reasoning_content"]?.stringValue ?? "")
      : choice["text"]?.stringValue ?? ""
    if !text.isEmpty { record.pieces.append((now, 0)) }
  }
}

/// Finds out what the numbers of synthetic prompts can stand for on a server.
struct UnitDiscovery {
  var client: ServerClient
  var model: String

  /// Token ids below the vocabulary's size, or those that the server's tokenizer makes of common words.
  func tokens(vocabularySize: Int?) async throws -> PromptUnits {
    if let vocabularySize { return .tokens((0..<vocabularySize).map { TokenID($0) }) }
    for path in ["/model_info", "/server_info", "/get_model_info", "/get_server_info"] {
      guard let answer = try? await client.get(path) else { continue }
      for name in ["vocab_size", "vocabulary_size"] {
        if let size = answer[name]?.intValue, size > 1 { return .tokens((0..<size).map { TokenID($0) }) }
      }
    }
    if let ids = await tokenize(PromptUnits.commonWords.joined(separator: " ")) {
      let distinct = Array(Set(ids)).sorted()
      if distinct.count > 16 { return .tokens(distinct) }
    }
    throw CommandFailure.usage(
      "The server does not say how large its vocabulary is; pass --vocab-size, or --text for prompts of words.")
  }

  /// Words that the server's tokenizer counts as one token each, and how many tokens it adds to a text; common words as
  /// they are where it cannot be asked.
  func words() async -> (units: PromptUnits, added: Int, isExact: Bool) {
    let all = PromptUnits.commonWords
    guard let repeated = await tokenize("the the the the the the the the the") else {
      return (.words(all), 0, false)
    }
    let single = await tokenize("the") ?? repeated
    // What a text costs beyond its words, such as a beginning-of-sequence token.
    let base = single.count - 1
    if let whole = await tokenize(all.joined(separator: " ")), whole.count == all.count + base {
      return (.words(all), base, true)
    }
    var words: [String] = []
    // A word is one token if nine of it are eight tokens more than one of it.
    for word in all.prefix(256) {
      guard let one = await tokenize(word),
        let nine = await tokenize(Array(repeating: word, count: 9).joined(separator: " "))
      else { break }
      if nine.count - one.count == 8 { words.append(word) }
    }
    return words.count >= 16 ? (.words(words), max(0, base), true) : (.words(all), 0, false)
  }

  private func tokenize(_ text: String) async -> [TokenID]? {
    let body: JSONValue = ["model": .string(model), "prompt": .string(text), "content": .string(text)]
    for body in [["prompt": .string(text)], body] as [JSONValue] {
      guard let answer = try? await client.post("/tokenize", body) else { continue }
      if let tokens = (answer["tokens"] ?? answer["input_ids"] ?? answer["ids"])?.arrayValue {
        return tokens.compactMap { $0.intValue.flatMap { TokenID(exactly: $0) } }
      }
    }
    return nil
  }
}
