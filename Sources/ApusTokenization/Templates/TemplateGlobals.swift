import Glibc

/// The functions that every template sees.
let templateGlobals: [String: @Sendable () -> Value] = [
  "range": {
    .object(
      FunctionObject("safe_range") { machine, arguments in
        if !arguments.keywords.isEmpty { throw TemplateFault.type("range() takes no keyword arguments") }
        var bounds: [Int] = []
        for value in arguments.positional {
          guard let bound = integer(value) else {
            throw TemplateFault.type("'\(typeName(value))' object cannot be interpreted as an integer")
          }
          bounds.append(bound)
        }
        let range: RangeObject
        switch bounds.count {
        case 0: throw TemplateFault.type("range expected at least 1 argument, got 0")
        case 1: range = RangeObject(0, bounds[0], 1)
        case 2: range = RangeObject(bounds[0], bounds[1], 1)
        case 3:
          if bounds[2] == 0 { throw TemplateFault.value("range() arg 3 must not be zero") }
          range = RangeObject(bounds[0], bounds[1], bounds[2])
        default: throw TemplateFault.type("range expected at most 3 arguments, got \(bounds.count)")
        }
        // The counts of very wide ranges need not fit an integer; such ranges are too long in any case.
        let isWide = bounds.contains { $0.magnitude > 1 << 60 }
        if isWide || range.count > 100_000 {
          throw TemplateFault.overflow(
            "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).")
        }
        return .object(range)
      })
  },
  "dict": {
    .object(
      FunctionObject(
        "dict", type: "TemplateDict",
        members: { name in
          guard name == Text("fromkeys") else { return nil }
          return .object(
            FunctionObject("fromkeys", type: "method") { machine, arguments in
              let keys = try pythonList(machine, arguments.positional.first ?? .none)
              let value = arguments.positional.count > 1 ? arguments.positional[1] : .none
              return .dict(try DictBox(pairs: keys.map { ($0, value) }))
            })
        }
      ) { machine, arguments in .dict(try DictBox(pairs: dictPairs(machine, arguments))) })
  },
  "namespace": {
    .object(
      FunctionObject("TemplateNamespace", type: "type") { machine, arguments in
        let namespace = NamespaceObject()
        for (key, value) in try dictPairs(machine, arguments) {
          guard case .string(let name) = key else {
            throw TemplateFault.unsupported("A namespace of the template has a key that is no string")
          }
          try namespace.set(name, value)
        }
        return .object(namespace)
      })
  },
  "cycler": {
    .object(
      FunctionObject("Cycler", type: "type") { _, arguments in
        guard !arguments.positional.isEmpty else {
          throw TemplateFault("RuntimeError", "at least one item has to be provided")
        }
        return .object(CyclerObject(arguments.positional))
      })
  },
  "joiner": {
    .object(
      FunctionObject("Joiner", type: "type") { _, arguments in
        let bound = try arguments.bind("__init__", ["sep"])
        return .object(JoinerObject(bound[0] ?? .string(", ")))
      })
  },
  "lipsum": {
    .object(
      FunctionObject("generate_lorem_ipsum") { _, _ in
        throw TemplateFault.unsupported(
          "The function 'lipsum' is not supported: a prompt must not depend on chance")
      })
  },
  "raise_exception": {
    .object(
      FunctionObject("raise_exception") { _, arguments in
        let bound = try arguments.bind("raise_exception", ["message"], required: 1)
        throw TemplateFault(TemplateFault.raised, pythonString(bound[0]!).string)
      })
  },
  "strftime_now": {
    .object(
      FunctionObject("strftime_now") { machine, arguments in
        let bound = try arguments.bind("strftime_now", ["format"], required: 1)
        guard case .string(let format) = bound[0]! else {
          throw TemplateFault.type("strftime() argument 1 must be str, not \(typeName(bound[0]!))")
        }
        return .string(machine.clock().formatted(format))
      })
  },
]

/// The pairs of `dict(mapping or pairs, name=value...)`.
private func dictPairs(_ machine: Machine, _ arguments: CallArguments) throws -> [(Value, Value)] {
  var pairs: [(Value, Value)] = []
  if arguments.positional.count > 1 {
    throw TemplateFault.type("dict expected at most 1 argument, got \(arguments.positional.count)")
  }
  if let first = arguments.positional.first {
    if case .dict(let box) = first {
      pairs = Array(zip(box.keys, box.values))
    } else {
      for (position, item) in try pythonList(machine, first).enumerated() {
        let parts: [Value]
        do {
          parts = try pythonList(machine, item)
        } catch let fault as TemplateFault where fault.kind == "TypeError" {
          throw TemplateFault.type("cannot convert dictionary update sequence element #\(position) to a sequence")
        }
        guard parts.count == 2 else {
          throw TemplateFault.value(
            "dictionary update sequence element #\(position) has length \(parts.count); 2 is required")
        }
        pairs.append((parts[0], parts[1]))
      }
    }
  }
  try machine.charge(pairs.count)
  return pairs + arguments.keywords.map { (.string($0.name), $0.value) }
}

extension ChatTemplate.LocalTime {
  /// The time as `datetime.strftime` writes it in the C locale, without a time zone.
  func formatted(_ format: Text) -> Text {
    // Python fills in what the C library cannot: microseconds, and the missing time zone.
    var prepared: [UInt8] = []
    var index = 0
    while index < format.bytes.count {
      if format.bytes[index] == UInt8(ascii: "%"), index + 1 < format.bytes.count {
        switch format.bytes[index + 1] {
        case UInt8(ascii: "f"):
          let digits = String(microsecond)
          prepared.append(contentsOf: (String(repeating: "0", count: max(0, 6 - digits.count)) + digits).utf8)
        case UInt8(ascii: "z"), UInt8(ascii: "Z"): break
        default: prepared.append(contentsOf: format.bytes[index...(index + 1)])
        }
        index += 2
      } else {
        prepared.append(format.bytes[index])
        index += 1
      }
    }
    if prepared.isEmpty { return .empty }
    var time = tm()
    time.tm_year = Int32(year - 1900)
    time.tm_mon = Int32(month - 1)
    time.tm_mday = Int32(day)
    time.tm_hour = Int32(hour)
    time.tm_min = Int32(minute)
    time.tm_sec = Int32(second)
    time.tm_wday = Int32(weekday)
    time.tm_yday = Int32(dayOfYear - 1)
    time.tm_isdst = -1
    // An end mark tells an empty result from a buffer that was too small.
    prepared.append(UInt8(ascii: "x"))
    prepared.append(0)
    let capacity = prepared.count * 32 + 256
    let written = [UInt8](unsafeUninitializedCapacity: capacity) { buffer, count in
      count = buffer.withMemoryRebound(to: CChar.self) { characters in
        prepared.withUnsafeBufferPointer { format in
          format.withMemoryRebound(to: CChar.self) {
            Glibc.strftime(characters.baseAddress!, capacity, $0.baseAddress!, &time)
          }
        }
      }
    }
    return Text(bytes: Array(written.dropLast()))
  }

  /// Days since the start of the year, counted from one.
  private var dayOfYear: Int {
    let isLeap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
    let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334]
    return before[(month - 1) % 12] + (isLeap && month > 2 ? 1 : 0) + day
  }

  /// The day of the week, Sunday being zero (Sakamoto's method).
  private var weekday: Int {
    let offsets = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4]
    let shifted = month < 3 ? year - 1 : year
    return (shifted + shifted / 4 - shifted / 100 + shifted / 400 + offsets[(month - 1) % 12] + day) % 7
  }
}
