// What the page does in the browser by itself: keys, conversations kept there, files to save. Sends no request.
const CONVERSATIONS_KEPT = 50;
const STORAGE_KEY = "adapterhub.conversations.1";

addEventListener("keydown", (event) => {
    const stop = [...document.querySelectorAll("button.stop")].find((button) => button.offsetParent);
    if (event.key === "Escape" && stop) {
        stop.click();
    } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        document.querySelector("#picker input")?.focus();
    } else if (event.key === "Enter" && !event.shiftKey && stop && event.target.closest?.("#box")) {
        // One answer at a time: the text waits in the box.
        event.preventDefault();
        event.stopImmediatePropagation();
    }
}, true);

addEventListener("click", (event) => {
    // A flag with one choice needs no menu.
    const flag = event.target.closest?.(".extra-feedback > button");
    flag?.parentElement.querySelector(".extra-feedback-option")?.click();
    polishSoon();
});

// Fix what Gradio leaves without an accessible name, or as a button within a button.
const polish = () => {
    document.querySelectorAll(".thought-group .arrow button:not([inert])").forEach((button) => { button.inert = true; });
    document.querySelectorAll('.extra-feedback > button[aria-label="Feedback"]').forEach((button) => {
        button.ariaLabel = button.title = "Say what it should have said";
    });
    document.querySelectorAll(".said:not([aria-live])").forEach((note) => note.setAttribute("aria-live", "polite"));
    document.querySelectorAll("button.label-wrap").forEach((button) => {
        button.querySelectorAll(".icon").forEach((icon) => { icon.ariaHidden = "true"; });
        const inside = button.parentElement.querySelector('[data-testid="accordion-content"]');
        button.ariaExpanded = String(inside?.style.display !== "none");
    });
};
let polishing = false;
const polishSoon = () => {
    if (polishing) return;
    polishing = true;
    requestAnimationFrame(() => { polishing = false; polish(); });
};
new MutationObserver(polishSoon).observe(document, { subtree: true, childList: true });

const messageText = (message) => typeof message.content === "string"
    ? message.content : message.content.map((block) => block.text ?? "").join("");
const isNote = (message) => Boolean(message.metadata?.title);

// Read from storage each time: another tab may have written.
const readConversations = () => {
    try { return JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? []; } catch { return []; }
};
const writeConversations = (all) => {
    for (let kept = all.slice(0, CONVERSATIONS_KEPT); ; kept = kept.slice(0, -1)) {
        try { localStorage.setItem(STORAGE_KEY, JSON.stringify(kept)); return kept; }
        catch (full) { if (kept.length < 2) return kept; }  // the oldest go first
    }
};
const choices = (kept) => kept.map((conversation) => [conversation.title, conversation.id]);

const conversationTitle = (chat) => {
    const first = chat.find((message) => message.role === "user");
    const text = first ? messageText(first).trim().replace(/\s+/g, " ") : "";
    return text.length > 48 ? text.slice(0, 47) + "…" : text || "Conversation";
};
const fileName = (title) =>
    (title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "chat").slice(0, 50);

// The turns, and who gave each answer: a note follows the answer it is about.
const turnsOf = (chat) => chat.map((message, at) => ({ message, by: chat[at + 1]?.metadata?.id }))
    .filter(({ message }) => !isNote(message))
    .map(({ message, by }) => {
        const cut = by && message.role === "assistant" ? by.lastIndexOf("@") : -1;
        const turn = { role: message.role, content: messageText(message) };
        return cut < 0 ? { turn } : { turn, model: by.slice(0, cut), digest: by.slice(cut + 1) };
    });

const download = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// What Gradio's events call (serve/ui/script.py): each takes the values of the event's inputs, and returns its outputs.
window.adapterhub = {
    keepConversation: (id, chat) => {
        if (!chat?.length) return { __type__: "update" };
        const now = { id: id ?? Date.now().toString(36), title: conversationTitle(chat), messages: chat };
        const all = writeConversations([now, ...readConversations().filter((one) => one.id !== now.id)]);
        return { __type__: "update", choices: choices(all), value: now.id };
    },
    listConversations: () => ({ __type__: "update", choices: choices(readConversations()) }),
    openConversation: (id) => [id, readConversations().find((one) => one.id === id)?.messages ?? []],
    newConversation: () => [null, []],
    deleteConversation: (id) => {
        const all = writeConversations(readConversations().filter((one) => one.id !== id));
        return { __type__: "update", choices: choices(all), value: null };
    },
    saveAsJson: (chat, system) => {
        const turns = turnsOf(chat ?? []);
        if (!turns.length) return;
        const said = system?.trim() ? [{ role: "system", content: system.trim() }] : [];
        const messages = [...said, ...turns.map(({ turn }) => turn)];
        const answered_by = turns.flatMap(({ model, digest }, at) =>
            model ? [{ message: at + said.length, model, digest: digest || null }] : []);
        const text = JSON.stringify({ messages, answered_by }, null, 1);
        download(fileName(conversationTitle(chat)) + ".json", "application/json", text);
    },
    saveAsMarkdown: (chat, system) => {
        const turns = turnsOf(chat ?? []);
        if (!turns.length) return;
        const parts = turns.map(({ turn, model, digest }) => turn.role === "user"
            ? `**You**\n\n${turn.content}`
            : `**${model ?? "Corrected"}**${digest ? ` \`${digest.slice(0, 19)}\`` : ""}\n\n${turn.content}`);
        const head = [`# ${conversationTitle(chat)}`, ...(system?.trim() ? [`> ${system.trim()}`] : [])];
        const text = [...head, ...parts].join("\n\n") + "\n";
        download(fileName(conversationTitle(chat)) + ".md", "text/markdown", text);
    },
    saveFile: (name, type, text) => { if (text) download(name, type, text); },
    openIfWide: () => ({ __type__: "update", open: innerWidth > 700 }),
    keepInAddress: (name) => {
        const address = new URL(location);
        address.searchParams.set("adapter", name);
        history.replaceState(null, "", address);
    },
};
