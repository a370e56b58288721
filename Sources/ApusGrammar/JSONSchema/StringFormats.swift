/// The formats of JSON Schema as languages of texts, after the RFCs that the specification names.
///
/// Formats that no finite automaton decides (`regex`, and the tables of IDNA in `idn-hostname`) are refused. Where a language
/// stays below its format it is said at the place; none goes beyond.
final class StringFormats {
  enum Answer {
    case language(TextLanguage)
    /// No format of the specification: an annotation.
    case unknown
    case refused(String)
  }

  private let texts: TextLanguages
  private var built: [String: TextLanguage] = [:]

  init(_ texts: TextLanguages) { self.texts = texts }

  func language(_ name: String) -> Answer {
    if let known = built[name] { return .language(known) }
    switch name {
    case "regex": return .refused("is not a regular language")
    case "idn-hostname": return .refused("depends on the tables of IDNA 2008")
    default: break
    }
    guard let pattern = Self.pattern(name) else { return .unknown }
    var language: TextLanguage
    do {
      language = try texts.search("^(?:" + pattern + ")$")
    } catch {
      return .refused(error.reason)
    }
    if name == "hostname" { language = texts.all([language, texts.length(1, 253)]) }
    built[name] = language
    return .language(language)
  }

  private static func pattern(_ name: String) -> String? {
    switch name {
    case "date": date
    case "time": time
    case "date-time": "(?:\(date))[Tt](?:\(time))"
    case "duration": duration
    case "email": email(extra: "")
    case "idn-email": email(extra: "\\u0080-\\u{10FFFF}")
    case "hostname": hostname
    case "ipv4": ipv4
    case "ipv6": ipv6
    case "uri": URIs(extra: "", privateUse: "").absolute
    case "uri-reference": URIs(extra: "", privateUse: "").reference
    case "iri": URIs(extra: ucschar, privateUse: iprivate).absolute
    case "iri-reference": URIs(extra: ucschar, privateUse: iprivate).reference
    case "uri-template": uriTemplate
    case "uuid": "[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}"
    case "json-pointer": jsonPointer
    case "relative-json-pointer": "(?:0|[1-9][0-9]*)(?:#|\(jsonPointer))"
    default: nil
    }
  }

  // MARK: RFC 3339

  /// `full-date`, with the lengths of months and leap years.
  private static let date =
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    + "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    + "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"

  /// `full-time`. A leap second ends a day of UTC; it is known here for offsets of whole quarters of an hour.
  private static let time: String = {
    let fraction = "(?:\\.[0-9]+)?"
    var leaps: [String] = ["23:59:60\(fraction)[Zz]"]
    func two(_ value: Int) -> String { value < 10 ? "0\(value)" : "\(value)" }
    for offset in stride(from: 0, to: 24 * 60, by: 15) {
      for sign in [1, -1] {
        let local = (23 * 60 + 59 + sign * offset + 24 * 60) % (24 * 60)
        leaps.append(
          "\(two(local / 60)):\(two(local % 60)):60\(fraction)\(sign > 0 ? "\\+" : "-")\(two(offset / 60)):\(two(offset % 60))"
        )
      }
    }
    return "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\(fraction)(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])|"
      + leaps.joined(separator: "|")
  }()

  /// Appendix A.
  private static let duration: String = {
    let time = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
    let date = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
    return "P(?:\(date)(?:\(time))?|\(time)|[0-9]+W)"
  }()

  // MARK: Hosts and mail

  private static let hostname: String = {
    let end = "[A-Za-z0-9]"
    let any = "[A-Za-z0-9-]"
    // Spelled out, because a look-ahead may not be repeated: one or two characters; or a third that is no hyphen; or a
    // fourth that is none.
    let label =
      "(?:\(end){1,2}|\(end)\(any)\(end)|\(end)\(any)\(end)\(any){0,59}\(end)|\(end)\(any)-\(end)(?:\(any){0,58}\(end))?)"
    return "\(label)(?:\\.\(label))*"
  }()

  private static let ipv4: String = {
    let octet = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    return "\(octet)(?:\\.\(octet)){3}"
  }()

  /// RFC 4291, section 2.2.
  private static let ipv6: String = {
    let group = "[0-9A-Fa-f]{1,4}"
    let last = "(?:\(group):\(group)|\(ipv4))"
    var parts = ["(?:\(group):){6}\(last)", "::(?:\(group):){5}\(last)"]
    for before in 1...5 {
      let head = before == 1 ? "(?:\(group))?" : "(?:(?:\(group):){0,\(before - 1)}\(group))?"
      let tail = 5 - before
      parts.append("\(head)::\(tail == 0 ? "" : "(?:\(group):){\(tail)}")\(last)")
    }
    parts.append("(?:(?:\(group):){0,5}\(group))?::\(group)")
    parts.append("(?:(?:\(group):){0,6}\(group))?::")
    return parts.joined(separator: "|")
  }()

  /// RFC 5321, `Mailbox`.
  private static func email(extra: String) -> String {
    let atom = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~\(extra)-]+"
    let quotedString = "\"(?:[ !#-\\[\\]-~\(extra)]|\\\\[ -~])*\""
    let label = "[A-Za-z0-9\(extra)](?:[A-Za-z0-9\(extra)-]*[A-Za-z0-9\(extra)])?"
    return "(?:\(atom)(?:\\.\(atom))*|\(quotedString))"
      + "@(?:\(label)(?:\\.\(label))*|\\[(?:\(ipv4)|[Ii][Pp][Vv]6:(?:\(ipv6)))\\])"
  }

  // MARK: RFC 3986, 3987, 6570, 6901

  private static let ucschar =
    "\\u00A0-\\uD7FF\\uF900-\\uFDCF\\uFDF0-\\uFFEF"
    + (1...13).map { plane in
      "\\u{\(String(plane, radix: 16))0000}-\\u{\(String(plane, radix: 16))FFFD}"
    }.joined() + "\\u{E1000}-\\u{EFFFD}"
  private static let iprivate = "\\uE000-\\uF8FF\\u{F0000}-\\u{FFFFD}\\u{100000}-\\u{10FFFD}"

  private struct URIs {
    let absolute: String
    let reference: String

    init(extra: String, privateUse: String) {
      let unreserved = "A-Za-z0-9._~\(extra)-"
      let delimiters = "!$&'()*+,;="
      let percent = "%[0-9A-Fa-f]{2}"
      let character = "(?:[:@\(delimiters)\(unreserved)]|\(percent))"
      let userInfo = "(?:[:\(delimiters)\(unreserved)]|\(percent))*@"
      let name = "(?:[\(delimiters)\(unreserved)]|\(percent))*"
      let future = "[Vv][0-9A-Fa-f]+\\.[:\(delimiters)A-Za-z0-9._~-]+"
      let authority = "(?:\(userInfo))?(?:\\[(?:\(StringFormats.ipv6)|\(future))\\]|\(name))(?::[0-9]*)?"
      let segments = "(?:/\(character)*)*"
      let tail =
        "(?:\\?(?:[/?\(privateUse)]|\(character))*)?(?:#(?:[/?]|\(character))*)?"
      let rooted = "/(?:\(character)+\(segments))?"
      absolute =
        "[A-Za-z][A-Za-z0-9+.-]*:(?://\(authority)\(segments)|\(rooted)|\(character)+\(segments)|)\(tail)"
      let noColon = "(?:[@\(delimiters)\(unreserved)]|\(percent))+"
      let relative = "(?://\(authority)\(segments)|\(rooted)|\(noColon)\(segments)|)\(tail)"
      reference = "\(absolute)|\(relative)"
    }
  }

  private static let uriTemplate: String = {
    let percent = "%[0-9A-Fa-f]{2}"
    let literal = "(?:[!#$&'(-;=?-\\[\\]_a-z~\(ucschar)\(iprivate)]|\(percent))"
    let character = "(?:[A-Za-z0-9_]|\(percent))"
    let variable = "\(character)(?:\\.?\(character))*(?::[1-9][0-9]{0,3}|\\*)?"
    return "(?:\(literal)|\\{[+#./;?&=,!@|]?\(variable)(?:,\(variable))*\\})*"
  }()

  private static let jsonPointer = "(?:/(?:[^~/]|~[01])*)*"
}
