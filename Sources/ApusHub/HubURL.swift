/// An absolute `http` or `https` address, taken apart as far as redirects and credentials need it.
package struct HubURL: Sendable, Equatable {
  /// `http` or `https`.
  package let scheme: String
  /// The host in lower case; IPv6 addresses keep their brackets.
  package let host: String
  /// The port.
  package let port: Int
  /// Path and query, beginning with a slash or empty.
  package let path: String

  /// Reads an address.
  /// - Returns: `nil` for another scheme, user information before the host (which disguises the host), white space or
  ///   control characters, or more than 16 KiB.
  package init?(_ text: String) {
    guard text.utf8.count <= 16384, !text.utf8.contains(where: { $0 <= 0x20 || $0 == 0x7F || $0 == 0x5C }) else {
      return nil
    }
    guard let colon = text.firstIndex(of: ":"), text[colon...].hasPrefix("://") else { return nil }
    scheme = text[..<colon].lowercased()
    guard scheme == "http" || scheme == "https" else { return nil }
    let rest = text[text.index(colon, offsetBy: 3)...]
    let end = rest.firstIndex { $0 == "/" || $0 == "?" || $0 == "#" } ?? rest.endIndex
    let authority = rest[..<end]
    guard !authority.contains("@") else { return nil }
    let hostEnd: Substring.Index
    if authority.hasPrefix("[") {
      guard let bracket = authority.firstIndex(of: "]") else { return nil }
      hostEnd = authority.index(after: bracket)
    } else {
      hostEnd = authority.firstIndex(of: ":") ?? authority.endIndex
    }
    host = authority[..<hostEnd].lowercased()
    guard !host.isEmpty else { return nil }
    let portText = authority[hostEnd...]
    if portText.isEmpty {
      port = scheme == "https" ? 443 : 80
    } else {
      guard portText.first == ":", let number = Int(portText.dropFirst()), (1...65535).contains(number) else {
        return nil
      }
      port = number
    }
    let tail = rest[end...].prefix { $0 != "#" }
    path = tail.hasPrefix("?") ? "/" + HubURL.escapingNonASCII(tail) : HubURL.escapingNonASCII(tail)
  }

  private init(scheme: String, host: String, port: Int, path: String) {
    (self.scheme, self.host, self.port, self.path) = (scheme, host, port, path)
  }

  /// Scheme, host and port: who is spoken to. Credentials stay with one origin.
  package var origin: String { "\(scheme)://\(host):\(port)" }

  /// The address as text.
  package var text: String {
    let isDefault = port == (scheme == "https" ? 443 : 80)
    return "\(scheme)://\(host)" + (isDefault ? "" : ":\(port)") + path
  }

  /// The same origin with another path.
  package func appending(_ suffix: String) -> HubURL {
    HubURL(scheme: scheme, host: host, port: port, path: path + suffix)
  }

  /// The address that a `Location` or `Link` of an answer from this address means: absolute, without its scheme, or
  /// relative to the host or the folder.
  package func resolving(_ location: String) -> HubURL? {
    if location.contains("://"), let colon = location.firstIndex(of: ":"),
      location[..<colon].allSatisfy({ $0.isASCII && ($0.isLetter || $0.isNumber || "+-.".contains($0)) })
    {
      return HubURL(location)
    }
    if location.hasPrefix("//") { return HubURL(scheme + ":" + location) }
    let root = "\(scheme)://\(host):\(port)"
    if location.hasPrefix("/") { return HubURL(root + location) }
    let folder = path.prefix { $0 != "?" }
    let parent = folder.lastIndex(of: "/").map { String(folder[...$0]) } ?? "/"
    return location.isEmpty ? nil : HubURL(root + parent + location)
  }

  private static func escapingNonASCII(_ text: some StringProtocol) -> String {
    text.utf8.allSatisfy { $0 < 0x80 } ? String(text) : percentEncoded(String(text), keeping: { $0 < 0x80 })
  }
}

/// A text as one segment of a URL's path: everything but letters, digits and `-._~` escaped.
func percentEncoded(_ text: String) -> String {
  percentEncoded(text) { byte in
    switch byte {
    case 0x30...0x39, 0x41...0x5A, 0x61...0x7A, 0x2D, 0x2E, 0x5F, 0x7E: true
    default: false
    }
  }
}

private func percentEncoded(_ text: String, keeping isKept: (UInt8) -> Bool) -> String {
  let digits = Array("0123456789ABCDEF".utf8)
  var bytes: [UInt8] = []
  for byte in text.utf8 {
    if isKept(byte) {
      bytes.append(byte)
    } else {
      bytes += [0x25, digits[Int(byte >> 4)], digits[Int(byte & 15)]]
    }
  }
  return String(decoding: bytes, as: UTF8.self)
}
