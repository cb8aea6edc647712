"""Accompanying texts, and answers that state the evidence first: `picture $12 text $23 no`, not `no`."""

from data.maad.tiers import Tier, brands, products
from data.maad.vocab import (
    BANNED,
    CLAIMS,
    FILLERS,
    HARMLESS_BADGES,
    LOOKALIKES,
    NEEDS_NOTICE,
    NOTICES,
    OPENINGS,
    UNSEEN_LOOKALIKE,
)

_YES_NO = ("yes", "no")
CLASSES = {
    "price_match": _YES_NO,
    "product_match": _YES_NO,
    "brand_match": _YES_NO,
    "claim": ("nowhere", "picture", "text", "both"),
    "contact": ("none", "qr", "phone", "both"),
    "prohibited": _YES_NO,
    "risk_notice": ("exempt", "present", "missing"),
    "verdict": ("pass", "R1", "R2", "R3", "R4", "R5", "R6", "R7"),
}
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_PHRASES = (*FILLERS, *LOOKALIKES, UNSEEN_LOOKALIKE)


def accompanying(tier: Tier, text) -> str:
    """Returns the text that accompanies the image.

    Args:
        tier: the preset.
        text: latents of the text, including its wording.

    Returns:
        Two to five sentences in lower case, except for the brand.
    """
    opening, first, second, claim, notice, order = text.wording
    named = {"brand": brands(tier)[0][text.brand].name, "product": products(tier)[text.product].name}
    parts = [OPENINGS[opening].format(price=text.price, **named)]
    parts.append(_PHRASES[first] if second < 0 else f"{_PHRASES[first]}, {FILLERS[second]}")
    extra = []
    if text.claim:
        forbidden = CLAIMS[text.claim - 1]
        extra.append((*forbidden.texts, forbidden.unseen)[claim])
    if text.notice:
        extra.append(NOTICES[notice])
    parts.append(". ".join(extra))
    return ". ".join(parts[place] for place in _ORDERS[order] if parts[place]) + "."


def badge(claim: int) -> str:
    """Returns the name of an image's badge in answers: a claim, a harmless word or `none`."""
    if claim == 0:
        return "none"
    if claim <= len(CLAIMS):
        return CLAIMS[claim - 1].name
    return HARMLESS_BADGES[claim - 1 - len(CLAIMS)].lower()


def _said(claim: int) -> str:
    return CLAIMS[claim - 1].name if claim else "none"


def _contact(picture) -> str:
    return CLASSES["contact"][picture.qr + 2 * picture.phone]


def _notice(category: str, picture, text) -> str:
    if category not in NEEDS_NOTICE:
        return "exempt"
    return "present" if picture.notice or text.notice else "missing"


def _verdict(tier: Tier, picture, text) -> str:
    """Evidence for seven rules in a fixed order, up to the first broken rule."""
    product, text_product = products(tier)[picture.product], products(tier)[text.product]
    brand, text_brand = brands(tier)[0][picture.brand].name, brands(tier)[0][text.brand].name
    notice, contact = _notice(product.category, picture, text), _contact(picture)
    rules = (
        (product.name, product.category not in BANNED),
        (f"claim {badge(picture.claim)} {_said(text.claim)}", not (0 < picture.claim <= len(CLAIMS) or text.claim)),
        (f"${picture.price} ${text.price}", picture.price == text.price),
        (text_product.name, picture.product == text.product),
        (f"{brand} {text_brand}", picture.brand == text.brand),
        (f"notice {notice}", notice != "missing"),
        (f"contact {contact}", contact == "none"),
    )
    parts = []
    for place, (evidence, holds) in enumerate(rules, start=1):
        parts.append(evidence)
        if not holds:
            return " ".join((*parts, f"R{place}"))
    return " ".join((*parts, "pass"))


def answer(tier: Tier, latents) -> str:
    """Returns the answer to an advertisement's question: the evidence, then the class as last word.

    Args:
        tier: the preset.
        latents: the advertisement.

    Returns:
        The answer in lower case, except for brands (MerZen) and rules (R1 to R7).
    """
    picture, text, kind = latents.picture, latents.text, latents.type
    product = products(tier)[picture.product]
    match kind:
        case "category":
            return f"{product.name} {product.category}"
        case "product":
            return product.name
        case "price":
            return f"${picture.price}"
        case "brand":
            return brands(tier)[0][picture.brand].name
        case "price_match":
            return _compared(f"${picture.price}", f"${text.price}")
        case "product_match":
            return _compared(product.name, products(tier)[text.product].name)
        case "brand_match":
            return _compared(brands(tier)[0][picture.brand].name, brands(tier)[0][text.brand].name)
        case "claim":
            shown = 0 < picture.claim <= len(CLAIMS)
            where = CLASSES["claim"][shown + 2 * bool(text.claim)]
            return f"picture {badge(picture.claim)} text {_said(text.claim)} {where}"
        case "contact":
            return _contact(picture)
        case "prohibited":
            return f"{product.name} {'yes' if product.category in BANNED else 'no'}"
        case "risk_notice":
            shown, said = ("yes" if seen else "no" for seen in (picture.notice, text.notice))
            return f"{product.name} picture {shown} text {said} {_notice(product.category, picture, text)}"
        case _:
            return _verdict(tier, picture, text)


def caption(tier: Tier, picture) -> str:
    """Returns everything that an image shows, in one line.

    Args:
        tier: the preset.
        picture: latents of the image.
    """
    product, brand = products(tier)[picture.product], brands(tier)[0][picture.brand].name
    shown = f"{product.name} {product.category} ${picture.price} {brand} badge {badge(picture.claim)}"
    return f"{shown} contact {_contact(picture)} notice {'yes' if picture.notice else 'no'}"


def _compared(picture: str, text: str) -> str:
    return f"picture {picture} text {text} {'yes' if picture == text else 'no'}"
