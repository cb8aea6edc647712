"""Vocabulary of MAAD-synth: products, brands, claims and phrases of the accompanying text."""

from typing import NamedTuple


class Product(NamedTuple):
    """An advertised product; `icon` is the name of its drawing in both icon sets."""

    name: str
    category: str
    icon: str


_PRODUCTS = {
    "fruit": "apple:red-apple banana grapes pineapple strawberry",
    "clothing": "shirt:t-shirt shoe:running-shoe hat:top-hat dress jeans gloves",
    "tech": "laptop camera phone:mobile-phone television headphone printer",
    "sport": "football:soccer-ball basketball bicycle skateboard scooter:kick-scooter tennis",
    "health": "pill syringe thermometer bandage:adhesive-bandage stethoscope",
    "alcohol": "beer:beer-mug wine:wine-glass cocktail:cocktail-glass sake whiskey:tumbler-glass",
    "meal": "pizza burger:hamburger sushi bread taco",
    "music": "guitar violin drum trumpet saxophone",
    "vehicle": "car:automobile motorcycle airplane sailboat tractor",
    "home": "sofa:couch-and-lamp bed chair door umbrella",
    "finance": "coin money:money-bag bank card:credit-card chart:bar-chart",
    "gambling": "dice:game-die slots:slot-machine joker billiard:pool-8-ball",
    "sweets": "cake:birthday-cake donut:doughnut cookie icecream:ice-cream lollipop",
    "drinks": "coffee:hot-beverage tea:teacup-without-handle milk:glass-of-milk boba:bubble-tea juice:cup-with-straw",
}
CATEGORIES = tuple(_PRODUCTS)
PRODUCTS = tuple(
    Product(name, category, icon or name)
    for category, words in _PRODUCTS.items()
    for name, _, icon in (word.partition(":") for word in words.split())
)

# Categories that must not be advertised, and categories that need a risk notice.
BANNED = frozenset({"alcohol", "gambling"})
NEEDS_NOTICE = frozenset({"health", "finance"})

SHAPES = ("circle", "square", "triangle", "star", "plus")
COLOURS = {
    "red": (214, 40, 40),
    "green": (36, 150, 60),
    "blue": (40, 84, 214),
    "purple": (140, 50, 170),
    "black": (20, 20, 24),
}
# Brand names consist of two syllables, so that unseen names can be read.
SYLLABLES = (
    ("ba", "den", "fi", "gor", "ju", "kal", "lo", "mer", "ni", "pav", "ru", "sol", "tek", "vi", "wam", "zo"),
    ("bex", "co", "dri", "fa", "gum", "ha", "kin", "lys", "mo", "nat", "pe", "ris", "sta", "tou", "va", "zen"),
)


class Claim(NamedTuple):
    """A forbidden claim: its name in answers, the text of the badge, and its wordings in texts."""

    name: str
    badge: str
    texts: tuple[str, ...]
    unseen: str


CLAIMS = (
    Claim("best", "BEST", ("the best there is", "simply the best", "best in town"), "nobody doubts it is the best"),
    Claim("first", "NO.1", ("the no.1 choice", "ranked no.1", "no.1 in the country"), "everyone says no.1"),
    Claim("cure", "CURE", ("a cure for all", "it can cure you", "cure in a week"), "doctors call it a cure"),
    Claim("sure", "100%", ("works 100% of the time", "100% sure", "100% safe"), "we swear it is 100% good"),
)
# Harmless words on badges, and phrases that only look like claims.
HARMLESS_BADGES = ("SALE", "NEW", "GIFT", "FRESH")
LOOKALIKES = (
    "best before may",
    "best wishes from us",
    "no.7 blend",
    "no.12 on the shelf",
    "secure checkout",
    "made with cured oak",
    "10% off today",
    "open 24 hours",
)
UNSEEN_LOOKALIKE = "all the best for your trip"
FILLERS = (
    "order now",
    "made with care",
    "while stocks last",
    "free delivery",
    "loved by many",
    "come and see",
    "a gift for you",
    "only this week",
    "for every day",
    "simple and good",
    "back in store",
    "ask us anything",
)
NOTICES = ("mind the risks", "read the risk notice", "risks apply")
SLOGANS = ("enjoy it", "so good", "for you", "every day", "get yours", "love it", "go for it", "be happy")
OPENINGS = (
    "{brand} {product} for ${price}",
    "{product} by {brand} at ${price}",
    "only ${price}: {product} from {brand}",
    "${price} buys a {brand} {product}",
    "{brand} offers {product}, just ${price}",
    "new {product}, ${price}, {brand}",
)

QUESTIONS = {
    "category": "what category is pictured?",
    "product": "what product is pictured?",
    "price": "what price is pictured?",
    "brand": "what brand is pictured?",
    "price_match": "does the price match the text?",
    "product_match": "does the product match the text?",
    "brand_match": "does the brand match the text?",
    "claim": "where is a forbidden claim?",
    "contact": "what contact is pictured?",
    "prohibited": "is the product prohibited?",
    "risk_notice": "is the risk notice in order?",
    "verdict": "what is the verdict?",
}
TYPES = tuple(QUESTIONS)
