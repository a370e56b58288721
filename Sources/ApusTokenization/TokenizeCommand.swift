import ApusCore

/// The work of `apus tokenize`: text to ids and ids to text, one JSON line at a time.
public enum TokenizeCommand {
  /// What the flags of the command set.
  public struct Options: Sendable {
    /// Whether the tokens that the tokenizer's post-processor adds are added.
    public var addSpecialTokens = true
    /// Whether control tokens are left out of decoded text.
    public var skipSpecialTokens = false

    /// Special tokens are added and shown.
    public init() {}
  }

  /// Answers one line of input: `{"text": "..."}` or `{"ids": [...]}` gives `{"ids": [...], "text": "..."}`, where the text
  /// is what the ids decode to. A line that cannot be answered gives `{"error": "..."}`.
  public static func answer(line: String, tokenizer: Tokenizer, options: Options = Options()) -> String {
    var writer = JSONWriter()
    do throws(EngineError) {
      let ids = try ids(of: line, tokenizer, options)
      writer.object { writer in
        writer.key("ids")
        writer.array { writer in for id in ids { writer.value(Int(id)) } }
        writer.member("text", tokenizer.decode(ids, skipSpecialTokens: options.skipSpecialTokens))
      }
    } catch {
      writer.object { $0.member("error", error.message) }
    }
    return writer.text
  }

  private static func ids(of line: String, _ tokenizer: Tokenizer, _ options: Options) throws(EngineError) -> [TokenID]
  {
    let value: JSONValue
    do throws(JSONError) {
      value = try JSONValue.parse(line)
    } catch {
      throw EngineError(.invalidRequest, "The line is not JSON: \(error)")
    }
    if let text = value["text"]?.stringValue {
      return try tokenizer.encode(text, addSpecialTokens: options.addSpecialTokens)
    }
    guard let list = value["ids"]?.arrayValue else {
      throw EngineError(.invalidRequest, "The line must be an object with \"text\" (a string) or \"ids\" (integers)")
    }
    var ids: [TokenID] = []
    ids.reserveCapacity(list.count)
    for element in list {
      guard let id = element.intValue.flatMap({ TokenID(exactly: $0) }), tokenizer.tokenText(id) != nil else {
        throw EngineError(.invalidRequest, "\(element.compactText) is not the id of a token", parameter: "ids")
      }
      ids.append(id)
    }
    return ids
  }
}
