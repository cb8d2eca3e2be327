"""What questions to a chat model are made of: topics, tasks, names, sentences. Every word is this project's own.

`compose` draws one question; `models.training.prompts` draws thousands. Drawing the same twice is likely for the few
short kinds and is dealt with there.
"""

from __future__ import annotations

import random

TOPICS = """photosynthesis; the water cycle; black holes; the French Revolution; inflation; machine learning; neural
networks; electric cars; solar panels; vaccines; the immune system; volcanoes; earthquakes; the Roman Empire; the
Silk Road; democracy; the stock market; compound interest; encryption; computer viruses; recursion; sorting
algorithms; linked lists; operating systems; the internet; wireless networks; bicycles; airplanes; sailing ships;
trains; bridges; skyscrapers; gardening; composting; baking bread; roasting coffee; green tea; Italian cooking;
sushi; chocolate; a healthy breakfast; sleep; meditation; yoga; long-distance running; swimming; football; chess;
board games; video games; oil painting; photography; sculpture; jazz; classical music; the guitar; the piano;
poetry; novels; Greek mythology; ancient Egypt; the Vikings; the Middle Ages; the Renaissance; dinosaurs; whales;
elephants; bees; butterflies; ants; dogs; cats; owls; rainforests; deserts; coral reefs; climate change; recycling;
wind power; nuclear power; gravity; light; sound; magnetism; atoms; acids and bases; metals; DNA; evolution; cells;
the human heart; the brain; memory; emotions; stress; friendship; leadership; teamwork; public speaking; job
interviews; time management; a household budget; saving money; a small business; marketing; customer service; remote
work; online courses; learning a language; reading aloud; handwriting; libraries; museums; travel by train; Paris;
Tokyo; New York; mountains; rivers; oceans; the Moon; Mars; space travel; satellites; telescopes; robots; 3D
printing; smartphones; data privacy; passwords; databases; spreadsheets; cloud computing; Python; JavaScript; open
source software; software testing; debugging; version control; weather forecasts; thunderstorms; snow; autumn;
spring flowers; houseplants; minimalism; fashion; architecture; city planning; public transport; agriculture;
fishing; honey; cheese; fermentation; antibiotics; vitamins; first aid; tooth care; ageing; childhood; family
traditions; weddings; birthdays; volunteering; human rights; justice; ethics; logic; probability; statistics;
algebra; geometry; prime numbers; calculus; maps; clocks; glass; paper; cotton; rice; potatoes; salt; sugar; soap;
tides; rainbows; glaciers; caves; harbours; postal services; newspapers; radio; cinema; theatre; circus; dance;
knitting; pottery; woodworking; camping; cycling holidays; beach holidays; birdwatching; astronomy; genealogy;
puzzles; magic tricks; crossword puzzles; electric guitars; street food; vegetarian cooking; soup; pasta; apple pie;
lemonade; taxes; insurance; rent; mortgages; unemployment; trade; supply and demand; elections; parliaments; the
United Nations; traffic lights; elevators; batteries; microscopes; X-rays; lasers; transistors; compilers; search
engines; e-mail; web browsers; social media; podcasts; advertising; first impressions; body language; negotiation;
patience; curiosity; creativity; humour; gratitude; courage; honesty; failure; habits; procrastination; motivation;
goals"""

TASKS = {
    "explain": """Explain {t} in simple terms.|Explain {t} to a ten-year-old.|Explain {t} to a beginner, step by step.|
How does {t} affect our daily life?|Why is {t} important?|What is {t}? Give a definition and an example.|
What is the history of {t}?|What should everyone know about {t}?|What are common misconceptions about {t}?|
Describe {t} in one paragraph.|Teach me the basics of {t}.|Why do people care about {t}?|
What is the connection between {t} and {u}?|Give me an analogy for {t}.|
Answer briefly: what is the most interesting thing about {t}?""",
    "list": """List five facts about {t}.|Give me ten tips about {t}.|Name three examples that have to do with {t}.|
What are the advantages and disadvantages of {t}?|Make a table of contents for a book about {t}.|
Write a quiz with four questions about {t}, with answers.|Make a checklist for someone who is new to {t}.|
List the most important terms around {t} and explain each in one sentence.|Suggest six titles for an article about {t}.|
Give me a plan to learn about {t} in one week.|What questions would you ask an expert on {t}?|
List the steps that you would take to start with {t}.|Write seven short slogans about {t}.""",
    "compare": """Compare {t} with {u}.|What do {t} and {u} have in common?|
Which matters more, {t} or {u}? Give reasons.|What are the differences between {t} and {u}? Use bullet points.|
Should a school teach {t} or {u}?""",
    "write": """Write a short blog post about {t}.|Write an introduction for an essay on {t}.|
Write a persuasive paragraph in favour of {t}.|Write a product description that has to do with {t}.|
Write a news headline and a first paragraph about {t}.|Write a poem about {t}.|Write a haiku about {t}.|
Write a speech about {t} of about one minute.|Describe {t} as if you were a travel guide.|Write a song about {t}.|
Write a letter to the editor about {t}.|Write a conclusion for an essay on {t}.|Write a review of a book about {t}.""",
    "story": """Write a short story about {t}.|Tell a funny story that has to do with {t}.|
Write a dialogue between two friends about {t}.|Write a fairy tale in which {t} plays a part.|
Write the first paragraph of a novel about {t}.|Write a story of six sentences about {t} and {u}.""",
}

PROGRAMS = """reverses a string; checks whether a number is prime; computes the factorial of a number; sorts a list
of numbers; counts the words in a text; finds the largest element of a list; merges two sorted lists; removes
duplicates from a list; checks whether a word is a palindrome; reads a CSV file and prints its rows; converts
Celsius to Fahrenheit; computes the greatest common divisor of two numbers; flattens a nested list; finds the most
common word in a text; checks an e-mail address; generates a random password; counts the vowels in a string;
searches a sorted list; implements a stack; implements a queue; computes the mean and the median of a list;
transposes a matrix; multiplies two matrices; prints a multiplication table; groups words by their first letter;
parses a date like 2024-05-17; downloads a web page; writes a dictionary to a JSON file; finds all files with a
given extension; computes the area of a circle; rolls two dice; solves a quadratic equation; rotates a list by k
places; finds two numbers that add up to a given sum; converts a number to binary; converts Roman numerals to
integers; checks whether two words are anagrams; draws a triangle of stars; implements a calculator; models a bank
account; inverts a dictionary; splits a list into chunks; computes a checksum of a file; capitalises every word;
counts how often each letter occurs; finds the second largest number of a list; computes the distance between two
points; finds the longest word of a sentence; removes all spaces from a string; adds up the digits of a number;
checks whether brackets are balanced; implements a linked list; traverses a binary tree; measures how long a
function takes; retries a function that fails; caches the results of a function; reads a number from the user; plays
the game of guessing a number; formats a number with commas; computes compound interest"""

LANGUAGES = ("Python", "Python", "Python", "Python", "JavaScript", "Java", "C", "C++", "Go", "Rust", "SQL", "Bash")

CODE_TASKS = (
    "Write a {l} function that {c}.",
    "Write a {l} program that {c} and explain how it works.",
    "Show me {l} code that {c}, with comments.",
    "How do I write {l} code that {c}?",
    "Write a unit test for a {l} function that {c}.",
    "Write a {l} function that {c}, with a docstring and an example of its use.",
    "Give me a short {l} script that {c}. No explanation.",
)

TECHNICAL = """What is the difference between a list and a tuple in Python?|How do I read a file line by line in {l}?|
What does the error "index out of range" mean in {l}?|How do I sort a dictionary by its values in Python?|
Explain what a {d} is and when one would use it.|Compare a {d} with a {e}.|How is a {d} implemented?|
What is the time complexity of searching in a {d}?|Write a {l} class for a {d} with methods to add and remove.|
How do I handle errors in {l}?|How do I write a loop in {l}? Give two examples.|Show a small example of a {d} in {l}."""

STRUCTURES = """linked list; array; stack; queue; binary search tree; heap; graph; set; trie; dictionary;
matrix; priority queue; string buffer; ring buffer; database index"""

NAMES = """Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy
Yusuf Zoe Amir Bella Carlos Diana Erik Fatima George""".split()
THINGS = "apples pencils books marbles tickets cookies stamps coins flowers bottles cards shells eggs candles".split()
CITIES = """Berlin Madrid Rome Lisbon Vienna Prague Dublin Oslo Athens Cairo Nairobi Lima Toronto Chicago Boston Sydney
Seoul Delhi Bangkok Istanbul Warsaw Helsinki Zurich Brussels Montreal Denver""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
TONGUES = ("French", "Spanish", "German", "Italian", "Portuguese", "English in a formal style")

SUMS = (
    "{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?",
    "{n} has {ac} {t} and shares them equally among {c} friends. How many does each friend get?",
    "What is {a} times {b}? Show the steps.",
    "What is {a} plus {b}, minus {c}?",
    "A train travels {ac} kilometres in {c} hours. What is its average speed?",
    "{n} is {a} years old. {m} is {b} years older. How old is {m} in {c} years?",
    "Solve for x: {c}x + {a} = {abc}.",
    "A rectangle is {a} cm long and {b} cm wide. What are its area and its perimeter?",
    "What is {a} percent of {b}0?",
    "{n} buys {c} {t} at {b} dollars each and pays with {change} dollars. How much change does {n} get?",
    "A box holds {c} {t}. How many boxes does {n} need for {ac} {t}?",
    "{n} reads {a} pages a day. How many pages does {n} read in {c} weeks? Explain your answer.",
    "{n} and {m} have {ab} {t} together. {n} has {a} of them. How many has {m}?",
    "What is the average of {a}, {b} and {c}?",
)

ERRANDS = (
    "Write an e-mail from {n} to {m}: the call on {d} cannot take place because of a trip to {i}.",
    "Write a polite e-mail to {n} that asks for the report by {d}.",
    "Write an e-mail to a hotel in {i} that asks for a room for {c} nights from {d}.",
    "Write a short note that thanks {n} for the help on {d}.",
    "Write a letter of complaint from {n} about a late train to {i}.",
    "Write a job advertisement for a position in {i} that has to do with {t}.",
    "Write an e-mail to the whole team about {t}. Keep it short.",
    "Invite {m} to a birthday party in {i} on {d}.",
    "Write an apology from {n} to {m} for a missed appointment on {d}.",
    "Write a cover letter for {n}, who applies for a job that has to do with {t}.",
    "Write a text message from {n} to {m}: the plan for {d} has changed.",
)

TALK = (
    "Plan a three-day trip from {i} to {j}.",
    "What should I see in {i}? I have only one day.",
    "Compare {i} and {j} as places to live.",
    "Write a short story in which {n} and {m} meet in {i}.",
    "{n} wants to learn about {t} but has little time. What would you advise?",
    "Write a dialogue in which {n} explains {t} to {m}.",
    "Write a story that begins with: On {d}, {n} found a map of {i} in an old book.",
    "Write a speech that {n} gives about {t} in {i}.",
    "I have {a} dollars and want to give {n} a present. Any ideas?",
    "What can I cook with {x}, {y} and {z}?",
    "Give me a recipe with {x} and {y}.",
    "Hi! My name is {n} and I am from {i}. Tell me something about {t}.",
    "I am bored on a rainy {d}. What could I do that has to do with {t}?",
    "My friend {n} is sad about {t}. What can I say?",
    "Can you help me to choose between {t} and {u} as a hobby?",
    "Act as a teacher and ask me three questions about {t}.",
    "What would {n} pack for a week in {i} in winter?",
    "Do you think that {t} will change in the next ten years?",
)
FOODS = """rice; eggs; tomatoes; potatoes; chicken; beans; cheese; spinach; mushrooms; carrots; onions; apples;
bread; pasta; lemons; fish; tofu; lentils; butter; peppers; oats; bananas; yoghurt; garlic"""

SUBJECTS = """The old teacher; My neighbour; A group of tourists; The new manager; Our team; {n}; {n} and {m}; The
small bakery; The city council; A young engineer; The doctor; My sister; The museum in {i}; Her grandfather; The
train to {i}; The company; A farmer from the valley; The library; His best friend; The weather service"""
EVENTS = """has decided to open a second shop in {i}; wants to learn more about {t}; found a wallet in the park on
{d}; will give a talk about {t} next week; could not find the right key; bought {c} {h} at the market; was late
because of heavy snow; has worked on a project about {t} for {c} years; wrote a long letter to {m}; forgot the
meeting on {d}; will move to {j} at the end of the month; planted {c} trees behind the house; read a book about {t};
lost the way in the fog; sold the old car for {a}0 dollars; is going to repair the roof before winter; asked for a
refund; showed us the best way to {j}; prefers tea to coffee; has never been to {i}"""
ADDITIONS = """Nobody had expected that.; It took longer than planned.; The reason was simple: there was not enough
time.; Everyone was happy with the result.; The next step will be harder.; Some people did not agree.; It cost more
than {a} dollars.; The news spread quickly.; There is still a lot to do.; After that, {m} called and offered help.;
The rest of the day was quiet.; They will try again on {d}.; It was the first time in {c} years."""

SENTENCE_TASKS = {
    "translate": (
        'Translate into {g}: "{s}"',
        "Translate this sentence into {g}: {s}",
        "How do you say in {g}: {s}",
    ),
    "rewrite": (
        "Rewrite in a formal style: {s}",
        "Rewrite this in the past tense: {s}",
        "Turn this into a question: {s}",
        "Make this sentence shorter: {s}",
        "Rewrite this for a child: {s} {r}",
        "Repair spelling and grammar, without any comment: {b}",
        "Fix the grammar of this text: {b}",
    ),
    "summarise": (
        "Summarise in one sentence: {s} {r} {s2} {r2}",
        "Give this text a title: {s} {r} {s2} {r2}",
        "What happened, in five words or fewer? {s} {r} {s2}",
        "List the facts in this text: {s} {s2} {r2}",
        "Who does what in this text? {s} {r} {s2}",
    ),
}
# Common slips, for texts that are to be corrected.
SLIPS = (("has", "have"), ("was", "were"), ("the", "teh"), ("because", "becuase"), ("will", "wil"), ("found", "finded"),
         ("bought", "buyed"), ("a ", "an "), ("their", "there"), ("wrote", "writed"), ("is", "are"))  # fmt: skip

# How often each kind is drawn.
SHARES = {
    "explain": 14, "list": 13, "compare": 6, "write": 9, "story": 7, "code": 11, "technical": 3, "maths": 8,
    "e-mail": 6, "talk": 9, "translate": 4, "rewrite": 5, "summarise": 5,
}  # fmt: skip


def compose(draw: random.Random) -> tuple[str, str]:
    """(kind, question) of one question for a chat model."""
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    if kind in TASKS:
        t, u = draw.sample(_TOPICS, 2)
        return kind, draw.choice(_TASKS[kind]).format(t=t, u=u)
    if kind == "code":
        return kind, draw.choice(CODE_TASKS).format(l=draw.choice(LANGUAGES), c=draw.choice(_PROGRAMS))
    if kind == "technical":
        d, e = draw.sample(_STRUCTURES, 2)
        return kind, draw.choice(_TECHNICAL).format(l=draw.choice(LANGUAGES), d=d, e=e)
    words = _words(draw)
    if kind == "maths":
        return kind, draw.choice(SUMS).format(**(words | {"t": words["h"]}))
    if kind in SENTENCE_TASKS:
        return kind, _about_sentences(kind, draw)
    return kind, draw.choice(ERRANDS if kind == "e-mail" else TALK).format(**words)


def _words(draw: random.Random) -> dict[str, str | int]:
    """Something for every letter that a template may name."""
    a, b, c = draw.randint(2, 99), draw.randint(2, 40), draw.randint(2, 12)
    n, m = draw.sample(NAMES, 2)
    i, j = draw.sample(CITIES, 2)
    t, u = draw.sample(_TOPICS, 2)
    x, y, z = draw.sample(_FOODS, 3)
    numbers = {"a": a, "b": b, "c": c, "ab": a + b, "ac": a * c, "abc": a + b * c, "change": b * c + a}
    return numbers | {
        "n": n, "m": m, "i": i, "j": j, "t": t, "u": u, "x": x, "y": y, "z": z,
        "d": draw.choice(DAYS), "g": draw.choice(TONGUES), "h": draw.choice(THINGS),
    }  # fmt: skip


def _about_sentences(kind: str, draw: random.Random) -> str:
    def sentence() -> str:
        return f"{draw.choice(_SUBJECTS)} {draw.choice(_EVENTS)}.".format(**_words(draw))

    def addition() -> str:
        return draw.choice(_ADDITIONS).format(**_words(draw))

    wrong = f"{sentence()} {addition()}"
    for right, slip in draw.sample(SLIPS, 6):
        wrong = wrong.replace(f" {right.strip()} ", f" {slip.strip()} ")
    return draw.choice(SENTENCE_TASKS[kind]).format(
        g=draw.choice(TONGUES), s=sentence(), s2=sentence(), r=addition(), r2=addition(), b=wrong
    )


def _split(text: str, at: str = ";") -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(at))


_TOPICS, _PROGRAMS, _STRUCTURES, _TECHNICAL = (
    _split(TOPICS),
    _split(PROGRAMS),
    _split(STRUCTURES),
    _split(TECHNICAL, "|"),
)
_FOODS, _SUBJECTS, _EVENTS, _ADDITIONS = _split(FOODS), _split(SUBJECTS), _split(EVENTS), _split(ADDITIONS)
_TASKS = {kind: _split(text, "|") for kind, text in TASKS.items()}
