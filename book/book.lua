-- What staging marks with classes and attributes, in Typst's words (the PDF)
-- or in plain pandoc elements (the EPUB).
local typst = FORMAT == "typst"

local function raw(text) return pandoc.RawBlock("typst", text) end

local function quoted(text)
  text = text:gsub("\\", "\\\\"):gsub('"', '\\"'):gsub("\n", "\\n")
  return '"' .. text .. '"'
end

local function content(blocks)
  return "[" .. pandoc.write(pandoc.Pandoc(blocks), "typst") .. "]"
end

local function inline(inlines) return content({pandoc.Plain(inlines)}) end

-- Pandoc's translation, where it misses: spaces, large brackets, names of
-- operators, the columns of cases, names that Typst has changed.
local function formula(math, number)
  local alt = math.text:gsub("^%s+", ""):gsub("%s+$", ""):gsub("%s+", " ")
  math.text = math.text:gsub("\\;", "\\:"):gsub("\\!", "")
    :gsub("\\[bB]igg?l", "\\left"):gsub("\\[bB]igg?r", "\\right")
  local body = pandoc.write(pandoc.Pandoc({pandoc.Plain({math})}), "typst")
  body = body:gsub("^%s+", ""):gsub("%s+$", "")
  body = body:gsub('([^%(])"(%a+)"', '%1op("%2")'):gsub("(%a)%.circle", "%1.o")
  body = body:gsub("cases(%b())", function(cases)
    return "cases" .. cases:gsub(" & ", " quad & ")
  end)
  local extra = number and (", number: " .. quoted(number)) or ""
  return "#m(" .. quoted(alt) .. ", " .. body .. extra .. ")"
end

-- First: formulas, and the numbers in captions.
local function Span(span)
  if span.classes:includes("number") then
    return pandoc.Strong(span.content)
  elseif span.classes:includes("equation") then
    local number = span.attributes.number
    span.attributes.number = nil
    if typst then
      return pandoc.RawInline("typst", formula(span.content[1], number)
        .. " <" .. span.identifier .. ">")
    end
    span.content:insert(1, pandoc.Span("(" .. number .. ")", {class = "eqno"}))
    return span
  end
end

local function Math(math)
  if typst then return pandoc.RawInline("typst", formula(math) .. ";") end
end

-- Citations are text by now.
local function Cite(cite) return cite.content end

-- Then: blocks. Levels: 1 part, preface, bibliography; 2 chapter; 3 section.
local shift = 1  -- 0 in the preface

local function Header(header)
  local number, word = header.attributes.number, header.attributes.word
  header.attributes.number, header.attributes.word = nil, nil
  if typst then
    if header.level == 1 then
      shift = (word == "Part" or number == "") and 0 or 1
    end
    local level = header.level + shift
    local label = ""
    if header.identifier:match("^%a+%-") and word then
      label = " <" .. header.identifier .. ">"
    end
    local numbering = "none"
    if number and number ~= "" then
      numbering = "(..n) => " .. quoted(number)
    end
    return raw("#heading(level: " .. level .. ", numbering: " .. numbering
      .. ", supplement: [" .. (word or "") .. "], outlined: "
      .. tostring(header.level < 4 and level ~= header.level
        or header.level == 1) .. ")" .. inline(header.content)
      .. label .. "\n")
  end
  if number and number ~= "" then
    header.content:insert(1, pandoc.Str(number .. "\u{2002}"))
  end
  return header
end

local function CodeBlock(block)
  if not typst then return end
  local call, lang = "code", block.classes[1] or "text"
  if lang == "output" or lang == "stderr" then call, lang = lang, "text" end
  if block.classes:includes("answered") then call = "question" end
  local exported = block.classes:includes("exported") and ", exported: true"
  return raw("#" .. call .. "(raw(block: true, lang: " .. quoted(lang) .. ", "
    .. quoted(block.text) .. ")" .. (exported or "") .. ")")
end

local function Figure(figure)
  if not typst then return end
  local image
  figure:walk({Image = function(found) image = found end})
  if not image then return end
  return raw("#picture(" .. quoted("/stage/nbs/" .. image.src) .. ", "
    .. quoted(pandoc.utils.stringify(image.caption)) .. ", "
    .. inline(figure.caption.long[1].content) .. ", "
    .. quoted(figure.identifier) .. ")")
end

local function Table(table)
  if not typst then return end
  local whole = #table.bodies[1].body <= 7
  return raw("#tabular(whole: " .. tostring(whole) .. ")"
    .. content({table}):gsub("align%(center%)", "align(left)", 1))
end

local function Div(div)
  if div.classes:includes("admonition") then
    local title = div.content:remove(1).content
    if typst then
      return raw("#admonition(" .. quoted(div.classes[2]) .. ", "
        .. inline(title) .. ", " .. content(div.content) .. ")")
    end
    div.content:insert(1, pandoc.Para({pandoc.Strong(title)}))
    return div
  elseif div.identifier == "refs" and typst then
    return raw("#references" .. content(div.content))
  end
end

local function Blocks(blocks)
  for i = 2, #blocks do
    local before, block = blocks[i - 1], blocks[i]
    if block.t == "BlockQuote" and before.t == "Header" and before.level == 1
        and typst then  -- what a chapter promises
      blocks[i] = raw("#promise" .. content(block.content))
    elseif before.t == "CodeBlock" and before.classes[1] == "python"
        and (block.t == "Table" or block.t == "CodeBlock"
             and block.classes[1] ~= "python") then
      before.classes:insert("answered")  -- stays with what it printed
    end
  end
  return blocks
end

return {{Span = Span, Cite = Cite}, {Math = Math}, {Blocks = Blocks},
        {Header = Header, CodeBlock = CodeBlock, Figure = Figure, Table = Table,
         Div = Div}}
