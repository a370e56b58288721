import ApusCore
import HTTPTypes
import Hummingbird
import NIOCore

extension EngineError {
  /// The status of the response that reports this error.
  var status: HTTPResponse.Status {
    switch code {
    case .invalidRequest, .promptTooLong, .unsupported: .badRequest
    case .unauthorized: .unauthorized
    case .forbidden: .forbidden
    case .modelNotFound, .notFound: .notFound
    case .queueFull: .tooManyRequests
    case .shuttingDown, .outOfMemory, .aborted: .serviceUnavailable
    case .timeout: .gatewayTimeout
    default: .internalServerError
    }
  }

  /// `type` of the error object, as OpenAI's API spells the kinds.
  private var type: String {
    switch code {
    case .invalidRequest, .promptTooLong, .unsupported, .modelNotFound, .notFound: "invalid_request_error"
    case .unauthorized: "authentication_error"
    case .forbidden: "permission_error"
    case .queueFull: "rate_limit_error"
    case .shuttingDown, .outOfMemory, .aborted, .timeout: "service_unavailable_error"
    default: "server_error"
    }
  }

  /// `code` of the error object; `nil` where the sentence says all there is.
  private var openAICode: String? {
    switch code {
    case .promptTooLong: "context_length_exceeded"
    case .modelNotFound: "model_not_found"
    case .notFound: "not_found"
    case .unauthorized: "invalid_api_key"
    case .queueFull: "rate_limit_exceeded"
    case .shuttingDown: "shutting_down"
    case .unsupported: "unsupported_value"
    case .aborted: "aborted"
    case .timeout: "timeout"
    default: nil
    }
  }

  /// Writes `{"error": {"message", "type", "param", "code"}}`, the shape of OpenAI's API.
  func write(to writer: inout JSONWriter) {
    writeErrorObject(message: message, type: type, parameter: parameter, code: openAICode, to: &writer)
  }

  /// The response that reports this error.
  var response: Response {
    var writer = JSONWriter()
    write(to: &writer)
    var response = Response(status: status, json: writer)
    switch code {
    // The queue moves within a step or two; a second is the shortest wait the header can say.
    case .queueFull, .shuttingDown: response.headers[.retryAfter] = "1"
    case .unauthorized: response.headers[.wwwAuthenticate] = "Bearer"
    default: break
    }
    return response
  }
}

/// Writes an error object in the shape of OpenAI's API.
func writeErrorObject(
  message: String, type: String, parameter: String?, code: String?, to writer: inout JSONWriter
) {
  writer.object { writer in
    writer.key("error")
    writer.object { writer in
      writer.member("message", message)
      writer.member("type", type)
      writer.member("param", parameter.map { .string($0) } ?? .null)
      writer.member("code", code.map { .string($0) } ?? .null)
    }
  }
}

/// An error that has a status of its own and no counterpart in the engine: a wrong path, a wrong method, a body too large.
struct RouteError: Error {
  var status: HTTPResponse.Status
  var message: String
  var code: String?
  var headers = HTTPFields()

  var response: Response {
    var writer = JSONWriter()
    writeErrorObject(message: message, type: "invalid_request_error", parameter: nil, code: code, to: &writer)
    var response = Response(status: status, json: writer)
    for field in headers { response.headers.append(field) }
    return response
  }
}

extension Response {
  /// A response whose body is a JSON document.
  init(status: HTTPResponse.Status = .ok, json: JSONWriter) {
    self.init(
      status: status, headers: [.contentType: "application/json"],
      body: ResponseBody(byteBuffer: ByteBuffer(bytes: json.bytes)))
  }

  /// A response whose body is a JSON object.
  init(status: HTTPResponse.Status = .ok, object: (inout JSONWriter) -> Void) {
    var writer = JSONWriter()
    writer.object(object)
    self.init(status: status, json: writer)
  }

  /// A response whose body is plain text.
  init(status: HTTPResponse.Status = .ok, text: String, contentType: String = "text/plain; charset=utf-8") {
    self.init(
      status: status, headers: [.contentType: contentType], body: ResponseBody(byteBuffer: ByteBuffer(string: text)))
  }
}
