import ApusCore
import HTTPTypes
import Hummingbird

/// How an API spells its errors.
enum ErrorStyle: Sendable {
  /// `{"error": {"message", "type", "param", "code"}}`.
  case openAI
  /// `{"type": "error", "error": {"type", "message"}}`.
  case anthropic
  /// `{"error": "message"}`.
  case ollama

  /// The style of the API that a path belongs to.
  init(path: String) {
    if path == "/v1/messages" || path.hasPrefix("/v1/messages/") {
      self = .anthropic
    } else if path.hasPrefix("/api/") {
      self = .ollama
    } else {
      self = .openAI
    }
  }

  /// The response to a failed request in this style, made of one in OpenAI's.
  ///
  /// - Parameters:
  ///   - response: the response in OpenAI's style; its status and headers are kept.
  ///   - message: one sentence for people.
  func restyled(_ response: Response, message: String) -> Response {
    var restyled: Response
    switch self {
    case .openAI: return response
    case .anthropic:
      restyled = Response(status: response.status) { writer in
        writeAnthropicError(type: anthropicErrorType(response.status), message: message, to: &writer)
      }
    case .ollama:
      restyled = Response(status: response.status) { $0.member("error", message) }
    }
    for field in response.headers where field.name != .contentType && field.name != .contentLength {
      restyled.headers.append(field)
    }
    return restyled
  }
}

/// Writes the members of an error in Anthropic's shape.
func writeAnthropicError(type: String, message: String, to writer: inout JSONWriter) {
  writer.member("type", "error")
  writer.key("error")
  writer.object { writer in
    writer.member("type", type)
    writer.member("message", message)
  }
}

/// The type of an error in Anthropic's API, which goes by the status.
func anthropicErrorType(_ status: HTTPResponse.Status) -> String {
  switch status.code {
  case 401: "authentication_error"
  case 403: "permission_error"
  case 404: "not_found_error"
  case 413: "request_too_large"
  case 429: "rate_limit_error"
  case 503: "overloaded_error"
  case 504: "timeout_error"
  case 400..<500: "invalid_request_error"
  default: "api_error"
  }
}
