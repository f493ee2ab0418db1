"""What an attacker would type or send: shared by every test that lets a stranger speak."""

from __future__ import annotations

SCRIPTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></textarea></bdi></td></article><script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    '<a href="javascript:alert(1)">x</a>',
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<!--><img src=x onerror=alert(1)>-->",
    "</script><script>alert(1)</script>",
    "<details open ontoggle=alert(1)>",
    "<link rel=stylesheet href=http://example.invalid/x.css><base href=http://example.invalid/>",
    "javascript:alert(1)//`${alert(1)}`",
    "{{7*7}} ${7*7} <%= 7*7 %> {% raw %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\u202e<b>\u2066x",
    "\0<\0script\0>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=http://example.invalid'>",
    "[x](javascript:alert(1)) ![x](http://example.invalid/x.png)",
)
"""Texts that run or load something wherever they are taken for HTML, Markdown or a template."""

NASTY = '"><img src=x onerror=alert(1)></bdi><script>alert(2)</script>'
"""One of them, for where one is enough."""

FORMULAS = ("=cmd|'/C calc'!A0", "+1+1", "-2+3", "@SUM(1)", "\t=1", "\r=1", '=HYPERLINK("http://example.invalid")')
"""Cells that a spreadsheet would run."""

NO_JSON = (
    b"[" * 100_000,
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": ' + b"9" * 10_000 + b"}",
    b'{"a": "\\ud800"}',
    b"\xff\xfe{}",
    b"\0",
    b"[]",
    b"null",
    b"",
)
"""Bytes that break readers of JSON, or are JSON of another shape than any reader wants."""
