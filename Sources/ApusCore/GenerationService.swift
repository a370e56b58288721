/// What a server, a router or a program needs of an engine, wherever that engine runs.
///
/// `ApusEngine.Engine` conforms in process; a client of a remote server can conform too. Nothing above this protocol
/// sees the engine's own types.
public protocol GenerationService: Sendable {
  /// What is served. Constant for the life of the service.
  var model: ModelInformation { get }

  /// Submits a request. The stream's first element arrives when the first token does; dropping the stream's iterator
  /// aborts the request.
  ///
  /// - Throws: `invalidRequest`, `promptTooLong`, `queueFull` (nothing was queued), `shuttingDown`.
  func generate(_ request: Request) throws(EngineError) -> GenerationStream

  /// Ends a request early; its stream finishes with `FinishReason.abort`. Unknown names are ignored.
  /// - Returns: whether the request was in flight.
  @discardableResult
  func abort(_ id: RequestID) -> Bool

  /// Ends every request in flight.
  func abortAll()

  /// The token ids of a text.
  /// - Parameter addSpecialTokens: whether the tokenizer's own post-processor (beginning-of-sequence and the like) runs.
  func encode(_ text: String, addSpecialTokens: Bool) throws(EngineError) -> [TokenID]

  /// The text of token ids.
  func decode(_ tokens: [TokenID], skipSpecialTokens: Bool) throws(EngineError) -> String

  /// The text that the vocabulary holds for one token, for reports of log-probabilities: its exact bytes, which need not
  /// be whole characters.
  func tokenBytes(_ token: TokenID) -> [UInt8]

  /// The prompt that the model's chat template makes of a conversation.
  /// - Throws: `invalidRequest` with the template's own message where it raises, `unsupported` if there is no template.
  func renderChat(_ prompt: ChatPrompt) throws(EngineError) -> String

  /// Counts and levels, for load reports and metrics.
  func statistics() -> ServiceStatistics

  /// Empties the prefix cache once nothing runs.
  /// - Returns: `false` if requests were still running when `timeout` (seconds) had passed.
  func flushCache(timeout: Double) async -> Bool

  /// Stops admitting requests and returns when those in flight have ended.
  func drain() async

  /// What turns texts into vectors, if the model does that; `nil` by default.
  var embeddings: (any EmbeddingService)? { get }

  /// What records the loads of experts, where that was asked for and the model has any; `nil` by default.
  var expertLoads: (any ExpertLoadService)? { get }
}

/// A conversation to be rendered by a chat template. Values are as in the request's JSON, since templates read them so.
public struct ChatPrompt: Sendable, Equatable {
  /// The messages: an array of objects with `role` and `content`.
  public var messages: JSONValue
  /// The tools offered, an array, or `nil`.
  public var tools: JSONValue?
  /// Whether the prompt ends with the opening of the assistant's turn.
  public var addGenerationPrompt: Bool
  /// Whether the last message is left open to be continued.
  public var continueFinalMessage: Bool
  /// Further variables for the template (`chat_template_kwargs`).
  public var variables: [String: JSONValue]

  /// Makes a conversation.
  public init(
    messages: JSONValue, tools: JSONValue? = nil, addGenerationPrompt: Bool = true,
    continueFinalMessage: Bool = false, variables: [String: JSONValue] = [:]
  ) {
    self.messages = messages
    self.tools = tools
    self.addGenerationPrompt = addGenerationPrompt
    self.continueFinalMessage = continueFinalMessage
    self.variables = variables
  }
}

/// What a service says of the model it serves.
public struct ModelInformation: Sendable {
  /// The name clients use.
  public var name: String
  /// Where the checkpoint was read from.
  public var path: String
  /// The architecture in `config.json`, such as `LlamaForCausalLM`.
  public var architecture: String
  /// Number of parameters.
  public var parameterCount: Int
  /// The longest sequence, prompt and output together, in tokens.
  public var contextLength: Int
  /// Rows of the model's output.
  public var vocabularySize: Int
  /// Weight format and K/V format, such as `bfloat16`.
  public var dtype: String
  /// The K/V cache's format.
  public var kvDtype: String
  /// End-of-sequence tokens.
  public var eosTokenIDs: [TokenID]
  /// The beginning-of-sequence token, if the tokenizer has one.
  public var bosTokenID: TokenID?
  /// Sampling defaults from the checkpoint's `generation_config.json`, under the names of the native API.
  public var samplingDefaults: SamplingDefaults
  /// Whether a chat template is at hand.
  public var hasChatTemplate: Bool
  /// The text of the chat template that is used when tools are offered; empty if there is none.
  public var chatTemplate: String
  /// Texts of the vocabulary's special tokens, which decoding leaves out if asked to.
  public var specialTokens: [String]
  /// When the service started, in seconds since 1970.
  public var created: Int

  /// Makes a description.
  public init(
    name: String, path: String, architecture: String, parameterCount: Int, contextLength: Int, vocabularySize: Int,
    dtype: String, kvDtype: String, eosTokenIDs: [TokenID], bosTokenID: TokenID?, samplingDefaults: SamplingDefaults,
    hasChatTemplate: Bool, chatTemplate: String = "", specialTokens: [String] = [], created: Int
  ) {
    self.name = name
    self.path = path
    self.architecture = architecture
    self.parameterCount = parameterCount
    self.contextLength = contextLength
    self.vocabularySize = vocabularySize
    self.dtype = dtype
    self.kvDtype = kvDtype
    self.eosTokenIDs = eosTokenIDs
    self.bosTokenID = bosTokenID
    self.samplingDefaults = samplingDefaults
    self.hasChatTemplate = hasChatTemplate
    self.chatTemplate = chatTemplate
    self.specialTokens = specialTokens
    self.created = created
  }
}

/// Sampling values that a checkpoint recommends; `nil` where it is silent.
public struct SamplingDefaults: Sendable, Equatable {
  public var temperature: Float?
  public var topK: Int?
  public var topP: Float?
  public var minP: Float?
  public var repetitionPenalty: Float?
  public var maxNewTokens: Int?

  /// No recommendation.
  public init() {}

  /// Puts the recommended values into parameters whose caller was silent about all of them.
  public func apply(to parameters: inout SamplingParameters) {
    if let temperature { parameters.temperature = temperature }
    if let topK { parameters.topK = topK == 0 ? -1 : topK }
    if let topP { parameters.topP = topP }
    if let minP { parameters.minP = minP }
    if let repetitionPenalty { parameters.repetitionPenalty = repetitionPenalty }
  }
}

/// Counts and levels of a service at one moment.
public struct ServiceStatistics: Sendable, Equatable {
  /// Requests being computed.
  public var runningRequests = 0
  /// Requests waiting for their first step.
  public var waitingRequests = 0
  /// The most requests that may run at once.
  public var maxRunningRequests = 0
  /// The most requests that may wait.
  public var maxQueuedRequests = 0
  /// Capacity of the K/V pool, in tokens.
  public var kvCapacityTokens = 0
  /// Tokens of the pool that requests in flight hold.
  public var kvUsedTokens = 0
  /// Tokens of the pool that hold cached prefixes nobody uses at the moment.
  public var kvEvictableTokens = 0
  /// Tokens of the pool that hold nothing.
  public var kvFreeTokens = 0
  /// The share of requested output that admission reserves now; in [0, 1].
  public var newTokenRatio = 0.0
  /// Output tokens per second over the last seconds.
  public var generationThroughput = 0.0
  /// Steps since the start.
  public var steps = 0
  /// Requests that ended, by the way they ended.
  public var finishedRequests = 0
  public var abortedRequests = 0
  public var rejectedRequests = 0
  /// Prompt, cached-prompt and output tokens since the start.
  public var promptTokens = 0
  public var cachedTokens = 0
  public var generatedTokens = 0
  /// Draft tokens of speculative decoding, how many of them were accepted, and the forward passes that verified them.
  public var draftTokens = 0
  public var acceptedDraftTokens = 0
  public var verifications = 0
  /// Of the output tokens, those that a grammar left no choice about and that took no forward pass each (jump-forward).
  public var forcedTokens = 0
  /// Draws that were put off to a later step, since the mask of what a grammar allows was not there in time.
  public var postponedDraws = 0
  /// Retractions since the start.
  public var retractions = 0
  /// Tokens evicted from the prefix cache since the start.
  public var evictedTokens = 0
  /// Seconds the engine thread spent deciding and delivering, and seconds the model ran, since the start.
  public var schedulerSeconds = 0.0
  public var forwardSeconds = 0.0
  /// Bytes of memory that the process has resident.
  public var residentBytes = 0
  /// Whether new requests are refused because the service is stopping.
  public var isDraining = false

  /// How draft tokens fared.
  public var speculation: SpeculationCounts {
    SpeculationCounts(verifications: verifications, draftTokens: draftTokens, acceptedTokens: acceptedDraftTokens)
  }

  /// Zeroes.
  public init() {}
}
