/// How a model marks its chain of thought, as texts; special tokens count by their text.
public struct ThinkingMarks: Sendable, Equatable {
  /// Texts that begin it.
  public var opens: [String]
  /// Texts that end it.
  public var closes: [String]
  /// What is written to end it where the model did not: begins with one of `closes`.
  public var closing: String
  /// Whether the output begins within it, since the prompt opened it.
  public var isOpen: Bool
  /// Whether it may begin anywhere in the output, or only at its start.
  public var opensAnywhere: Bool

  /// Makes marks; by default `<think>` and `</think>`.
  public init(
    opens: [String] = ["<think>"], closes: [String] = ["</think>"], closing: String? = nil, isOpen: Bool = false,
    opensAnywhere: Bool = false
  ) {
    self.opens = opens
    self.closes = closes
    self.closing = closing ?? closes.first ?? ""
    self.isOpen = isOpen
    self.opensAnywhere = opensAnywhere
  }
}
