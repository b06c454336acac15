// make.mjs - writes vectors.txt: texts and the ids that Hugging Face's own tokenizers.js gives them.
//   npm install @huggingface/tokenizers@0.2.0   (in this folder; node_modules is not kept)
//   node make.mjs ../../../../shared/published >vectors.txt
// One case is three lines: "text" and its UTF-8 in hexadecimal, then "gpt2" and "gpt-neox-20b" with
// ids. Left out are what JavaScript and the Rust tokenizers see differently: U+FEFF and U+0085 (white
// space in one of them only), and characters newer than Unicode 13.
import { Tokenizer } from "@huggingface/tokenizers";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const published = process.argv[2];
const names = ["gpt2", "gpt-neox-20b"];
const tokenizers = names.map(
  (name) => new Tokenizer(JSON.parse(readFileSync(join(published, name, "tokenizer.json"), "utf8")), {}),
);

const scripts = {
  latin: "The quick brown fox jumps over the lazy dog; Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. L'été où Noël naquit, ça va? Příliš žluťoučký kůň.",
  greek: "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἐν ἀρχῇ ἦν ὁ Λόγος, καὶ ὁ Λόγος ἦν πρὸς τὸν Θεόν.",
  cyrillic: "Съешь же ещё этих мягких французских булок, да выпей чаю. Їхав козак містом, 1917 року.",
  arabic: "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر، ١٢٣٤٥ مَرْحَبًا بِالعَالَمِ.",
  hebrew: "דג סקרן שט בים מאוכזב ולפתע מצא חברה. בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם",
  devanagari: "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले। क़लम १२३ ज़्यादा",
  thai: "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓๔",
  han: "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。我们在2024年第3季度增长了12.5%！豈更車",
  japanese: "いろはにほへと　ちりぬるを、わかよたれそ。コンピュータで「東京」を検索する。ガギグ",
  hangul: "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 한국어 ㄱㄴㄷ",
  tamil: "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம் கொ",
  georgian: "გთხოვთ ახლავე გაიაროთ რეგისტრაცია Unicode-ის მეათე კონფერენციაზე.",
};

const cases = Object.values(scripts);
for (const text of Object.values(scripts)) cases.push(text.normalize("NFD"), text.normalize("NFC"));
cases.push(
  // Emoji: joined, with skin tones, flags, keycaps, variation selectors.
  "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ❤️‍🔥 ☺️ ☺︎ a👍🏿b 👍 👍",
  "ok👌ok 🤷🏻‍♀️'s 🤦🏼‍♂️'ll",
  // White space.
  " ", "  ", "   ", "    ", "\n", "\n\n", "\n\n\n", "\t", "\t\t\tx", " \n \n ", "a ", "a  ", "a   b",
  " a", "  a", "a\n", "a\n\nb", "a \nb", "a\r\nb\r\n\r\nc", "a\u00a0b", "\u3000\u3000あ", "x\u2028y\u2029z",
  "\u2003\u2003em", "a\u200bb", "\v\f \t\n mixed", "end of line   \n   next", "tabs\tand  spaces\t \t.",
  ...[2, 3, 4, 5, 7, 8, 15, 16, 23, 24, 25, 26, 31, 48, 49, 50, 73, 100, 257].map((n) => " ".repeat(n)),
  ...[2, 3, 4, 8, 23, 24, 25, 26, 48, 49, 60].map((n) => "if:\n" + " ".repeat(n) + "return x"),
  ...[1, 2, 5, 64].map((n) => "\n".repeat(n) + "x" + "\n".repeat(n)),
  ...[2, 7, 40].map((n) => "\t".repeat(n) + " ".repeat(n) + "\n y"),
  // Apostrophes.
  "I'm you're he's we'll they've I'd don't", "I'M YOU'RE HE'S", "'s 't 're 've 'm 'll 'd", "''s", "'''ll",
  "it''s 'tis '90s rock'n'roll O'Neill's", "x's's's", "'sx 'tx 'rex", "it’s ‘quoted’", " 's", "!'s", "a 'm b",
  "'r 'v 'l 'e", "d'accord l'homme qu'il", "1's 2'd", "'", "''", "'S", "中's",
  // Numbers.
  "0 1 12 123 1234 12345 3.14159 1,000,000 -5 +7 1e-9 0x1F 2^10", "1a2b3c", "½ ⅓ ² ³ Ⅻ ① 一二三 ٣٤٥ ௧௨",
  "2024-05-17T08:15:30.123Z", "192.168.0.1:8080", "٪١٢", "𝟘𝟙𝟚",
  // Code.
  "def f(x):\n    if x > 0:\n        return [i**2 for i in range(x)]\n    return None\n",
  "#include <stdio.h>\nint main(void)\n{\n\tprintf(\"%d\\n\", 1 << 4);\n\treturn 0; /* ok */\n}\n",
  "const a = {b: [1,2,3], 'c': `t${x}`}; a?.b ?? (() => {})();//!@#$%^&*()_+-=[]{}|;:,.<>/?",
  "<html><body class=\"x\">&nbsp;</body></html>", "SELECT * FROM t WHERE a='b' AND c<>4;--", "\\\\//\\n\\t",
  "user_name camelCase PascalCase SCREAMING_CASE kebab-case", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
  "https://example.org/a/b?c=d&e=f#g", "name@example.org", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=",
  "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz", "=".repeat(80), "-".repeat(41),
  "antidisestablishmentarianism".repeat(40), "ab".repeat(500), "字".repeat(120), "!?".repeat(90),
  // Canonical equivalents.
  "e\u0301 é e\u0323\u0301 e\u0301\u0323 \u1ec7 \u212b \u2126 \u212a", "\u1112\u1161\u11ab \uac00\u11a8",
  "q\u0307\u0323 q\u0323\u0307", "a" + "\u0316\u0301".repeat(30), "\u0958 \u0929 \u0928\u093c", "=\u0338 <\u0338",
  "\u037e \u1fef \u2000\u2001", "\u0344 \u0f73 \u0f75", "\u0301x \u0301", "\uf900\ufa10 \ufb1d\ufb2a", "\u30ab\u3099",
  // Control and rare characters.
  "\u0000\u0001\u001f\u007f", "a\u0000b", "\u00ad soft\u00adhyphen", "\u202eright\u202c", "\ufffd\ufffe", "\ue000\uf8ff",
  "\u{10ffff}\u{e0041}", "𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𐍈 𠜎𠜱", "",
  // Added tokens.
  "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ", "<|endoftext|><|endoftext|>", "x  <|endoftext|>  y",
  "<|endoftext|", "<|padding|>x<|padding|>", "<|END|>", "line\n<|endoftext|>\nline", "<<|endoftext|>>",
);

// Mixtures: pieces of all of it in random order, from a generator with a fixed seed (mulberry32).
let state = 20240517;
const random = (n) => {
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) % n;
};
const fixed = cases.filter((text) => text.length > 0);
const bits = [" ", "  ", "     ", "\n", "\t", "'s", "'", "'ll", "9", "42", "é", "e\u0301", "の", "👍", "!", "...", "A", "the"];
for (let i = 0; i < 250; i++) {
  let text = "";
  for (let parts = 2 + random(12); parts > 0; parts--) {
    if (random(2)) {
      text += bits[random(bits.length)];
    } else {
      const from = [...fixed[random(fixed.length)]];
      const start = random(from.length);
      text += from.slice(start, start + 1 + random(12)).join("");
    }
  }
  cases.push(text);
}

for (const text of cases) {
  console.log("text", Buffer.from(text, "utf8").toString("hex"));
  tokenizers.forEach((tokenizer, i) => {
    const { ids } = text === "" ? { ids: [] } : tokenizer.encode(text, { add_special_tokens: false });
    console.log([names[i], ...ids].join(" "));
  });
}
