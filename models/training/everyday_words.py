"""What fills the slots of everyday questions (`models.training.everyday`): slot -> entries between |. Our own words."""

WORDS_TEXT = {
    "name": """Anna|Ben|Clara|David|Emma|Frank|Grace|Henry|Ida|Jack|Kate|Leo|Mia|Noah|Olga|Paul|Rosa|Sam|Tina|
Victor|Wendy|Yusuf|Zoe|Amir|Bella|Carlos|Diana|Erik|Fatima|George|Priya|Kenji|Ling|Mateo|Nadia|Omar|Sofia|Tom|Lucy""",
    "person": """my brother|my sister|my best friend|my boss|my neighbour|a colleague|my roommate|my mother|my
father|my teenage son|my daughter|my partner|my grandmother|an old friend from school|a customer|my landlord|my
teacher""",
    "place": """Paris|Rome|Lisbon|Barcelona|Istanbul|Tokyo|Kyoto|Bangkok|Bali|Sydney|New Zealand|Iceland|Norway|
Scotland|Ireland|Greece|Croatia|Morocco|Egypt|South Africa|Kenya|India|Vietnam|Peru|Mexico City|Costa Rica|Canada|
California|New York|Chicago|Hawaii|London|Amsterdam|Berlin|Prague|Vienna|Budapest|Singapore|Seoul|Portugal""",
    "country": """France|Italy|Spain|Germany|Japan|China|Brazil|Argentina|Canada|Australia|Egypt|Kenya|Nigeria|
India|Sweden|Norway|Finland|Poland|Greece|Turkey|Mexico|Chile|Peru|Thailand|Vietnam|Portugal|Switzerland|Austria|
Russia""",
    "dish": """pancakes|an omelette|vegetable soup|chicken curry|fried rice|tomato sauce|lasagne|a Greek salad|
guacamole|banana bread|chocolate chip cookies|pizza dough|mashed potatoes|roast vegetables|lentil stew|scrambled
eggs|tacos|a fruit smoothie|overnight oats|mushroom risotto|chili|apple crumble|hummus|spaghetti carbonara|a
birthday cake""",
    "food": """rice|eggs|tomatoes|potatoes|chicken|beans|cheese|spinach|mushrooms|carrots|onions|apples|bread|
pasta|fish|tofu|lentils|peppers|oats|bananas|yoghurt|broccoli|salmon|zucchini|chickpeas|avocado|sweet potatoes|beef""",
    "diet": """a vegetarian|a vegan|someone with a nut allergy|someone who cannot eat gluten|a picky child|a
student on a small budget|a family of four|somebody who has only ten minutes|an athlete|a person with diabetes""",
    "hobby": """painting|playing the guitar|gardening|running|chess|photography|knitting|baking|birdwatching|
drawing|writing stories|yoga|swimming|cycling|woodworking|learning Spanish|reading novels|cooking|dancing|playing
the piano|climbing|journaling|video games|pottery|singing|fishing|collecting stamps|martial arts|skateboarding|
astronomy""",
    "feeling": """sad|lonely|nervous|overwhelmed|angry|bored|tired|stressed|jealous|disappointed|homesick|confused|
guilty|unmotivated|anxious|insecure|frustrated|proud|excited|grateful""",
    "trouble": """I cannot fall asleep at night|I argue with my partner about money|I have too much work|I failed
an exam|I did not get the job that I wanted|my best friend does not answer my messages|I moved to a new city and
know nobody|I spend too much time on my phone|I am afraid of flying|I forget people's names|I get nervous before
presentations|I cannot stop eating sweets|my neighbour is very loud|I always put things off|I lost my wallet|I feel
stuck in my job|my child does not want to do homework|my team does not listen to me|I cannot decide what to study|
my dog barks all day|I have a headache after work|I never have time for myself|I am shy at parties|I made a mistake
at work|my plants keep dying|my laptop is very slow|I am new at my job|I keep losing my keys|my back hurts from
sitting""",
    "goal": """wake up earlier|save money|lose weight in a healthy way|read more books|learn to code|run five
kilometres|drink more water|speak in front of people|find a new job|stop smoking|make new friends|eat less sugar|
sleep better|learn a new language|write a novel|be more patient|spend less time online|start a business|get better
grades|keep the house tidy|improve my memory|become more confident|grow my own vegetables|understand my bank
statements""",
    "chore": """clean a kitchen|remove a coffee stain|change a light bulb|iron a shirt|unclog a sink|fold a fitted
sheet|water indoor plants|pack a suitcase|tie a tie|change a flat tyre|back up a computer|reset a forgotten
password|sharpen a knife|boil an egg|remove chewing gum from a carpet|clean a keyboard|paint a wall|plant a tree|
wash a wool sweater|store potatoes|hang a picture|cut an onion|wrap a gift|write a cheque|build a birdhouse|take a
good photo|choose a ripe melon|clean windows|train a puppy|make a paper plane|organise a bookshelf|descale a kettle""",
    "business": """a coffee shop|a bookshop|a food truck|a dog-walking service|a yoga studio|an online shop for
candles|a bicycle repair shop|a tutoring service|a bakery|a cleaning company|a mobile app|a flower shop|a travel
agency|a photography studio|a second-hand clothes shop|a podcast|a small farm|a language school|a gym|an ice cream
parlour""",
    "product": """a reusable water bottle|a wooden toy|a wireless headset|a desk lamp|a handmade scarf|a fitness
app|a backpack|a set of kitchen knives|organic tea|a smart watch|a garden chair|a notebook|running shoes|a phone
case|a board game|a scented candle|a blender|a rain jacket|an electric toothbrush|a baby blanket""",
    "job": """teacher|nurse|engineer|accountant|graphic designer|software developer|chef|journalist|electrician|
lawyer|shop assistant|project manager|pilot|architect|librarian|photographer|data analyst|mechanic|social worker|
dentist|marketing manager|police officer|farmer|translator|scientist|waiter|bus driver|plumber|receptionist""",
    "role": """a friendly travel agent|a pirate|a medieval knight|a strict teacher|a football coach|a wise old man|
a detective|a robot that has just learnt to speak|a job interviewer|a doctor|a chef in a restaurant|a museum guide|
a news reporter|a talking cat|a ship's captain|a motivational speaker|a librarian|a scientist from the year 2200|a
shopkeeper|a personal trainer|a poet|a grandmother who gives advice|an alien who visits Earth|a history professor|a
stand-up comedian""",
    "science": """ice floats on water|leaves change colour in autumn|we dream|cats purr|the sea is salty|we yawn|
the moon has phases|metal feels colder than wood|onions make us cry|birds can fly|bread rises|planes stay in the
air|we have seasons|stars twinkle|magnets attract iron|boiling water bubbles|soap cleans|muscles get sore|thunder
comes after lightning|we need sleep|rubber bounces|fireflies glow|the wind blows|plants need light|hair turns grey|
rain falls in drops|wood burns|mirrors show our image|we feel pain|bicycles stay upright|tides rise and fall""",
    "things": """a planet and a star|a virus and a bacterium|weather and climate|a frog and a toad|a simile and a
metaphor|mass and weight|a loan and a grant|a lake and a pond|jam and jelly|a CPU and a GPU|HTTP and HTTPS|a law
and a theory|empathy and sympathy|a crocodile and an alligator|speed and velocity|a debit card and a credit card|
baking soda and baking powder|an atom and a molecule|stocks and bonds|a novel and a short story|affect and effect|
RAM and a hard disk|a comet and an asteroid|a republic and a monarchy|a moth and a butterfly|income and profit|a
symptom and a sign""",
    "term": """inflation|democracy|an algorithm|photosynthesis|gravity|an ecosystem|irony|capitalism|a metaphor|
empathy|osmosis|a mortgage|a black hole|evolution|a hypothesis|sustainability|biodiversity|an API|a budget|
cholesterol|karma|a prime number|entropy|procrastination|a constitution|nostalgia|a database|the placebo effect|a
sonnet|friction|supply and demand|an operating system|herd immunity|stoicism|open source|a dividend|the greenhouse
effect|a firewall|a haiku|globalisation|mindfulness|cognitive bias|a patent|latitude|an antibiotic|a blockchain|
resilience|a tariff""",
    "word": """ephemeral|resilient|ambiguous|benevolent|candid|diligent|eloquent|frugal|gregarious|humble|
impeccable|meticulous|notorious|obsolete|pragmatic|reluctant|spontaneous|tedious|vivid|witty|zealous|serendipity|
paradox|nuance|dilemma|coherent|subtle|inevitable|versatile|arbitrary|novel|concise|abundant|fragile""",
    "fact": """the capital of {country}|the largest ocean|the tallest mountain|the longest river|the boiling point
of water|the number of planets in the solar system|the author of Hamlet|the inventor of the telephone|the speed of
light|the currency of {country}|the language that is spoken in {country}|the smallest country in the world|the
chemical symbol of gold|the number of days in a leap year|the largest animal on Earth|the first person on the Moon|
the painter of the Mona Lisa|the number of bones in the human body|the closest star to Earth|the freezing point of
water in Fahrenheit|the largest desert|the year in which the Second World War ended|the number of continents|the
hardest natural material|the national animal of {country}|the most spoken language in the world|the main gas in the
air|the square root of {square}|the population of {country}|the flag of {country}|the plural of {plural}|the
opposite of {opposite}|the past tense of {verb}""",
    "square": "16|25|36|49|64|81|100|121|144|169|196|225",
    "plural": "mouse|child|leaf|tooth|sheep|city|knife|hero|person|cactus",
    "opposite": "generous|ancient|brave|expand|shallow|victory|polite|rare|temporary|increase",
    "verb": "go|write|teach|bring|swim|think|catch|begin|fly|choose|sing|drive",
    "opinion": """homework should be banned|remote work is better than the office|pineapple belongs on pizza|zoos
should exist|children should have smartphones|robots will take our jobs|money makes people happy|cities should ban
cars|books are better than films|everyone should learn to cook|space travel is worth its cost|school should start
later|a four-day week would work|social media does more harm than good|cats are better pets than dogs|we should eat
less meat|art should be free for everyone|competition is good for children|voting should be a duty|it is better to
rent than to buy a home""",
    "event": """a birthday party|a wedding|a team meeting|a school festival|a family reunion|a farewell party|a
charity run|a picnic|a housewarming|a book club|a job interview|a first date|a long car ride|a garden party|a
product launch|a game night|a street party|a graduation|a neighbourhood clean-up|a workshop|a talent show""",
    "animal": """a cat|a puppy|a hamster|a parrot|a goldfish|a rabbit|a horse|a turtle|an old dog|a budgie|a guinea
pig""",
    "genre": """mystery|fantasy|science fiction|romance|adventure|comedy|horror|historical|detective""",
    "hero": """a shy baker|a clever fox|an old clockmaker|a girl who can talk to trees|a lost astronaut|a tired
dragon|a boy with a broken bicycle|two sisters|a retired spy|a violinist|a talking teapot|a young inventor|a lonely
robot|a postman|a night nurse|a gardener|a street cat|a mapmaker|a stranded sailor|a librarian|a taxi driver|a
mouse in a theatre""",
    "find": """a hidden door|an old letter|a strange key|a map without names|a silver coin|a box that hums|a
forgotten song|a photograph of a stranger|a secret garden|a book with empty pages|a snow globe|a golden feather|a
diary""",
    "setting": """in a small village|on a distant planet|in a big city at night|on a train|in an old library|at the
sea|in a desert|during a snowstorm|in a museum after closing time|in a forest|on a mountain|in a crowded market|
under water""",
    "season": "spring|summer|autumn|winter",
    "days": "two|three|four|five|seven|ten",
    "n": "three|four|five|six|seven|eight|ten",
    "budget": "20 dollars|50 dollars|100 dollars|300 dollars|1000 dollars|200 euros|500 euros|40 pounds",
    "when": """today|tomorrow|this weekend|next week|on Monday|on Wednesday|on Friday evening|next month|in two
hours""",
    "subject": """history|maths|biology|chemistry|physics|English literature|geography|economics|music|computer
science""",
    "tool": """Excel|a spreadsheet|Git|the command line|PowerPoint|Google Docs|Photoshop|a text editor|Linux|Python""",
    "invention": """the wheel|the printing press|the telephone|the steam engine|the light bulb|penicillin|the
compass|the bicycle|the camera|the computer|the airplane|paper|the microscope|the internet|the refrigerator|the
radio""",
    "famous": """Albert Einstein|Marie Curie|Leonardo da Vinci|William Shakespeare|Cleopatra|Isaac Newton|Mozart|
Gandhi|Nelson Mandela|Charles Darwin|Galileo|Frida Kahlo|Julius Caesar|Ada Lovelace|Beethoven|Florence Nightingale|
Socrates|Vincent van Gogh|Alan Turing|Abraham Lincoln|Napoleon|Jane Austen|Nikola Tesla|Rosa Parks""",
    "language": "French|Spanish|German|Italian|Portuguese|Japanese|Latin",
    "phrase": """Good morning, how are you?|Where is the station?|I would like a cup of coffee, please.|Thank you
very much for your help.|How much does this cost?|I am looking for a hotel near the centre.|My name is {name}.|I do
not speak your language well.|See you {when}!|What time does the shop open?|The food was delicious.|Could you
repeat that, please?|I have lost my bag.|It is very cold {when}.|Can you recommend a restaurant?|We are going to
the beach {when}.""",
    "mail": """asks {person} for help with {event}|invites a friend to {event}|thanks {person} for a gift|cancels a
subscription|asks for a refund for {product}|applies for a job as a {job}|tells the team about {event}|says sorry
for a late reply|asks a professor for more time|declines an invitation to {event}|asks for a raise|reminds a
customer of an unpaid bill|congratulates {name} on a new job|introduces a new colleague|asks for feedback on a
draft|complains about {product} that arrived broken|books a table for {days} people|asks about the price of a
course|offers {product} for sale""",
    "text": """{name} opened {business} last year. At first few people came. Then a local paper wrote about it, and
now there is a queue every morning.|Many people try to {goal}. Most give up after two weeks. Those who plan small
steps are more successful.|{place} is popular in {season}. The hotels are full, and prices are high. Locals say
that the quiet months are better.|The team met to talk about {event}. {name} will find a room, {name2} will write
the invitations. The budget is {budget}.|{product} was sold out within {days} days. The company had not expected
this. New stock will come next month.|{name} has worked as a {job} for ten years. Now she wants to try something
new: {hobby}. Her family supports the plan.|Nobody knew why {science}. {name} asked the teacher, read two books and
finally made a small experiment. The answer was simpler than expected.|The school wants a garden. Pupils will grow
{food} and {food2}. Parents can help {when}.|Last night {trouble_he}. He called {name}, who had some good advice.
This morning everything looked better.""",
    "trouble_he": """he could not find his keys|he missed the last bus|he argued with a friend|he burnt the dinner|
he lost a chess game|he forgot an important date|his computer broke down|he could not sleep""",
    "trouble_i": """I have too much to do|nobody called me|I have to speak {when}|I lost a game|it rains all day|I
broke a vase|{person} forgot my birthday|I have an exam {when}|I cannot sleep|I have to move house|I said something
stupid|I am far from home|my plans for {event} fell through""",
    "trouble_you": """you have lost your hat|you are looking for treasure|you are late for {event}|you want to
learn {hobby}|nobody believes you|you are hungry|it is your first day|you have found {find}""",
    "dish_bare": """banana bread|vegetable soup|risotto|pizza|chicken curry|birthday cake|lasagne|rice|omelette|pie""",
    "machine": """a microwave|a refrigerator|a car engine|a battery|a thermometer|a camera|a washing machine|a
telescope|a solar cell|a touch screen|a helicopter|a vacuum cleaner|a submarine|a toaster|a wind turbine|a lock|a
zip|a clock|GPS|Wi-Fi|a lift|an aeroplane wing|a hot-air balloon|an X-ray machine""",
    "kind": """cheese|bread|tree|dance|fish|flower|cloud|sport|fruit|musical instrument|bird|fabric|pasta|boat|
insect|vegetable|rock|spice|dog|tea""",
    "letter": "A|B|C|D|E|F|G|L|M|P|S|T",
    "rhyme": "cat|moon|light|rain|tree|day|house|heart|star|blue|time|sea",
    "value": """honesty|kindness|freedom|money|success|friendship|health|family|courage|knowledge|patience|
fairness|creativity|safety|loyalty|ambition""",
    "wrong": """tell a white lie|read someone's diary|eat meat|skip school|give up|copy homework|keep money that
one found|be late on purpose|talk about people behind their backs|waste food|say no to {person}""",
    "thing": """an old T-shirt|a shoebox|a glass jar|a broken umbrella|newspapers|a wine cork|egg cartons|a bicycle
wheel|a wooden ladder|rubber bands|a tennis ball|plastic bottles|a bed sheet|tin cans|a paper clip|old books""",
    "sentence": """I was very happy when I got {product}.|We went to {place} and it was nice.|The meeting was long and
boring and nothing was decided.|He is a good {job} because he is good.|I think that maybe we could try {hobby}.""",
    "rude": """Send me the file now.|You are late again.|This is wrong. Do it again.|I do not want to come to
{event}.|Stop calling me.|Nobody asked you.|Your {dish_bare} is too salty.|I have no time for this.""",
    "casual": """hey, can u send the stuff {when}?|sorry, totally forgot about {event}|thx, looks good to me|no
idea, ask {name}|we gotta fix this asap|can't make it {when}, too busy|that's not gonna work for us""",
    "foreign": """Buenos días|Merci beaucoup|Guten Appetit|Je ne sais pas|¿Cómo estás?|Ich habe Hunger|Bonne
chance|Hasta mañana|C'est la vie|Wie heißt du?|Mi casa es su casa|Arrivederci""",
    "slip": """I has two cats.|She don't like {food}.|We was in {place} last year.|He go to work by bus.|Their is a
problem.|I am here since three days.|Him and me went to the shop.|The childrens are playing.|You should of told
me.|I did not saw nothing.|Its a nice day, is'nt it?|My sister she is a {job}.|There is many people here.|I goed
home.""",
    "more": """Can you give me an example?|I do not understand. Can you say it more simply?|Tell me more.|Why?|And
what is the biggest problem with it?|Is that always true?|Can you make a list?|What should I read about it?|Explain
it to a child.|How long does that take?|Thanks! Anything else?|What do beginners get wrong?""",
    "dinner": """Can you make it for {diet}?|I do not have {food}. What else?|How do I make it?|What can I serve
with it?|How long does it take?|Sounds good! Write a shopping list.|I had that yesterday. Another idea?""",
    "rename": """Hm, I do not like it. Give me {n} others.|Can it be funnier?|Make it shorter.|Why did you choose
this one?|Great! Now write a short text for the website.|Could it have something to do with {hobby}?|And in
{language}?""",
    "famousmore": """What did {famous} do exactly?|When was that?|Where?|Tell me {n} facts.|Were there others like
that at the time?|What can we learn from such a life?|Write a short poem about it.|Why is that important today?""",
    "activity": """We did that last week. Other ideas?|It will rain. What else?|We only have {budget}.|Good idea!
What do we need for it?|Plan the day for us, please.|What if we are tired?""",
    "jobhelp": """What should I learn next in my job?|Write a short profile about me.|I want to {goal}.|How can I
earn more?|Do you know a joke about my job?|{trouble}.|What other jobs would suit me?|What is my name?""",
    "capital": """And of {country}?|What can I see there?|How many people live there?|What language do they speak?|
What is it famous for?|How far is it from London?|Write two sentences about it.""",
    "kindmore": "Only the names.|A short description of each, please.|Just one, but explain it well.|Both!",
    "reason": "The simple one, please.|The exact one.|Both, but keep it short.|Whichever is more interesting.",
    "studymore": """I have to write about {term}.|I need to explain {invention}.|I do not know how to begin.|There
is an exam {when}.|I have to give a talk about {famous}.|Ask me some questions, I will try to answer.""",
}
