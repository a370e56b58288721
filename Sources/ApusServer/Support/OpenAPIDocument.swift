import ApusCore
import HTTPTypes

/// What the OpenAPI document says of an endpoint, beside its path, its methods and who may use it, which the routes tell.
struct EndpointDescription: Sendable {
  /// The body of a request.
  struct Body: Sendable {
    var name: String
    var contentType = "application/json"
    var schema: JSONValue

    /// A JSON object whose members are those of the table that decodes it.
    init<Target>(_ name: String, _ fields: FieldTable<Target>) {
      self.name = name
      schema = fields.schema
    }

    /// A body that no table decodes.
    init(_ name: String, contentType: String, schema: JSONValue) {
      self.name = name
      self.contentType = contentType
      self.schema = schema
    }
  }

  /// A parameter in the query.
  struct Parameter: Sendable {
    var name: String
    var schema: JSONValue
    var summary: String
  }

  /// The paths that share the description.
  var paths: [String]
  /// The methods that it holds for; empty is all of them.
  var methods: [HTTPRequest.Method] = []
  /// The group of endpoints it belongs to.
  var tag: String
  var summary: String
  var body: Body?
  var parameters: [Parameter] = []
  /// The types of a successful answer.
  var answers: [String]

  init(
    _ paths: String..., methods: [HTTPRequest.Method] = [], tag: String, _ summary: String, body: Body? = nil,
    parameters: [Parameter] = [], answers: [String] = ["application/json"]
  ) {
    self.paths = paths
    self.methods = methods
    self.tag = tag
    self.summary = summary
    self.body = body
    self.parameters = parameters
    self.answers = answers
  }
}

/// Makes the OpenAPI 3.1 document of a list of routes.
///
/// Every route is in it; what no description tells of is there with its path, its methods and a body of any kind.
struct OpenAPIDocument {
  let version: String
  /// Whether clients, and administrators, need a key.
  let needsKey: Bool
  let needsAdminKey: Bool
  private var paths = JSONObject()
  private var schemas = JSONObject()

  init(version: String, needsKey: Bool, needsAdminKey: Bool) {
    self.version = version
    self.needsKey = needsKey
    self.needsAdminKey = needsAdminKey
    schemas["Error"] = [
      "type": "object",
      "properties": [
        "error": [
          "type": "object",
          "properties": [
            "message": ["type": "string"], "type": ["type": "string"], "param": ["type": ["string", "null"]],
            "code": ["type": ["string", "null"]],
          ], "required": ["message", "type", "param", "code"],
        ]
      ], "required": ["error"],
    ]
    schemas["AnthropicError"] = [
      "type": "object",
      "properties": [
        "type": ["const": "error"],
        "error": [
          "type": "object", "properties": ["type": ["type": "string"], "message": ["type": "string"]],
          "required": ["type", "message"],
        ],
      ], "required": ["type", "error"],
    ]
    schemas["OllamaError"] = [
      "type": "object", "properties": ["error": ["type": "string"]], "required": ["error"],
    ]
  }

  /// Adds a route.
  mutating func add(_ route: Route, _ descriptions: [EndpointDescription]) {
    let (path, parameters) = Self.template(of: route.path)
    var item = paths[path]?.objectValue ?? JSONObject()
    for method in route.methods {
      let description = descriptions.first {
        $0.paths.contains(route.path) && ($0.methods.isEmpty || $0.methods.contains(method))
      }
      item[method.rawValue.lowercased()] = operation(method, path, parameters, route.access, description)
    }
    paths[path] = .object(item)
  }

  private mutating func operation(
    _ method: HTTPRequest.Method, _ path: String, _ pathParameters: [String], _ access: Access,
    _ description: EndpointDescription?
  ) -> JSONValue {
    var operation = JSONObject()
    let words = (method.rawValue.lowercased() + path).split { !$0.isLetter && !$0.isNumber }
    operation["operationId"] = .string(words.joined(separator: "_"))
    if let description {
      operation["summary"] = .string(description.summary)
      operation["tags"] = [.string(description.tag)]
    }
    var parameters: [JSONValue] = pathParameters.map {
      ["name": .string($0), "in": "path", "required": true, "schema": ["type": "string"]]
    }
    for parameter in description?.parameters ?? [] {
      parameters.append([
        "name": .string(parameter.name), "in": "query", "schema": parameter.schema,
        "description": .string(parameter.summary),
      ])
    }
    if !parameters.isEmpty { operation["parameters"] = .array(parameters) }
    if let body = description?.body {
      schemas[body.name] = body.schema
      operation["requestBody"] = [
        "required": true,
        "content": .object(JSONObject([(body.contentType, ["schema": Self.reference(body.name)])])),
      ]
    } else if description == nil, method == .post || method == .put {
      operation["requestBody"] = ["content": ["application/json": ["schema": [:]]]]
    }
    let types = description?.answers ?? ["application/json"]
    let content = types.map { type in
      (type, ["schema": type == "application/json" ? [:] : ["type": "string"]] as JSONValue)
    }
    let error =
      switch ErrorStyle(path: path) {
      case .openAI: "Error"
      case .anthropic: "AnthropicError"
      case .ollama: "OllamaError"
      }
    operation["responses"] = [
      "200": ["description": "The answer.", "content": .object(JSONObject(content))],
      "default": [
        "description": "What was wrong.", "content": ["application/json": ["schema": Self.reference(error)]],
      ],
    ]
    let isGuarded =
      switch access {
      case .open: false
      case .client: needsKey
      case .admin: needsAdminKey
      }
    operation["security"] = isGuarded ? [["bearer": []], ["apiKey": []]] : []
    return .object(operation)
  }

  /// The document.
  var json: JSONValue {
    [
      "openapi": "3.1.0",
      "info": [
        "title": "Apus", "version": .string(version),
        "description":
          "Serves a language model. Members of a body that are not listed are ignored, and null is as if left out.",
      ], "paths": .object(paths),
      "components": [
        "schemas": .object(schemas),
        "securitySchemes": [
          "bearer": ["type": "http", "scheme": "bearer"],
          "apiKey": ["type": "apiKey", "in": "header", "name": "x-api-key"],
        ],
      ],
    ]
  }

  private static func reference(_ name: String) -> JSONValue { ["$ref": .string("#/components/schemas/\(name)")] }

  /// A router's path as OpenAPI writes it, and the names of its parameters.
  private static func template(of path: String) -> (path: String, parameters: [String]) {
    var parameters: [String] = []
    let parts = path.split(separator: "/", omittingEmptySubsequences: false).map { part in
      var name: String?
      if part == "**" || part == "*" {
        name = "rest"
      } else if part.hasPrefix("{"), part.hasSuffix("}") {
        name = String(part.dropFirst().dropLast())
      } else if part.hasPrefix(":") {
        name = String(part.dropFirst())
      }
      guard let name else { return String(part) }
      parameters.append(name)
      return "{\(name)}"
    }
    return (parts.joined(separator: "/"), parameters)
  }
}
