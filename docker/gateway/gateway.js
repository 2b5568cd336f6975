// Decides on each request and counts it. Contract: `refusal` returns the HTTP status with which nginx.conf refuses, or an
// empty string; `infer` refuses malformed inferences. A key is 256 random bits, stored as a file named after its SHA-256.
// The check is one look-up in that folder, so a new, changed or removed key takes effect at the next request.
import fs from 'fs';
import crypto from 'crypto';

const BEARER = /^Bearer +(dsk_[A-Za-z0-9_-]{43})$/i;  // RFC 9110: a scheme in any case, then spaces
const MODEL = /^\/v2\/models\/(?!stats$)([A-Za-z0-9._-]+)/;  // /v2/models/stats: the statistics of all models
const GRPC_INFER = '/inference.GRPCInferenceService/ModelInfer';
const BULK = 2;  // Triton's priority of bulk requests (export/publishing/triton_config.py)
const NOT_BULK = `this key is for bulk requests: send "parameters": {"priority": ${BULK}, "bulk": true} with the request`;
const NAME = /^[A-Za-z0-9._-]{1,127}$/;
// An X.509 certificate's validity, in hex: two times, each a UTCTime (YYMMDD…Z) or a GeneralizedTime (YYYYMMDD…Z).
const VALIDITY = /30(?:1e|20|22)(?:170d(?:3\d){12}5a|180f(?:3\d){14}5a)(?:170d((?:3\d){12})5a|180f((?:3\d){14})5a)/;
const DURATION = 'gateway_request_duration_seconds';
const BUCKET = /_bucket\{(.*),le="([^"]+)"\}$/;
const IN_VAIN = /^(?:499|504|4|200)$/;  // callers without an answer: gave up, or timed out; 200: a broken gRPC call
const NOT_LOADED = 'has no available versions', UNREADABLE = 'Unable to parse';
const MOST_SERIES = 65536;  // more than the 2 MiB of `counts` hold; without a number njs gives 1024

// The entry of the request's key: {name, expires, rate_rps, bulk, hash}; null without a valid key.
function entryOf(r) {
    const match = BEARER.exec(r.headersIn['Authorization'] || '');
    if (!match) {
        return null;
    }
    const hash = crypto.createHash('sha256').update(match[1]).digest('hex');
    const path = `${r.variables.folder}/keys/${hash}.json`;
    try {
        const entry = JSON.parse(fs.readFileSync(path));
        entry.hash = hash;
        return entry.expires === null || entry.expires > Date.now() / 1000 ? entry : null;
    } catch (error) {
        if (error.code !== 'ENOENT') {
            ngx.log(ngx.ERR, `${path} gives no key (${error.message}), so its caller gets 401; the gateway's user must own the file`);
        }
        return null;
    }
}

// Whether a web page in a browser on this machine may have sent it: pages send their Origin, or a Host of their own.
function isFromAPage(r) {
    return Boolean(r.headersIn['Origin']) || !/^(localhost|127\.0\.0\.1)$/.test(r.variables.host);
}

function refusal(r) {
    // The ports without TLS need no key from this machine, have no rate, and also allow statistics.
    const isLocal = r.variables.https !== 'on' && r.variables.from_this_machine && !isFromAPage(r);
    const entry = isLocal ? { name: 'local' } : entryOf(r);
    if (!entry) {
        return '401';
    }
    r.variables.caller = entry.name;
    r.variables.bulk = entry.bulk ? '1' : '';
    r.variables.key = entry.hash || '';  // several keys may share a name; each has its own limits
    if (!r.variables.api && !(isLocal && r.variables.statistics)) {
        return '403';
    }
    if (entry.bulk && r.variables.request_uri === GRPC_INFER) {  // its priority is not checked
        return '403';
    }
    if (r.variables.api === 'openai' && !r.variables.openai) {  // unset in a limits.conf without such models
        return '404';
    }
    const encodings = [r.headersIn['Content-Encoding'], r.headersIn['grpc-encoding']];
    if (encodings.some(each => each && each.toLowerCase() !== 'identity')) {  // Triton unpacks without a limit
        return '415';
    }
    if (isLocal) {
        return '';
    }
    const rate = entry.rate_rps || Number(r.variables.default_rate_rps);
    const second = Math.floor(Date.now() / 1000);
    return ngx.shared.rates.incr(`${entry.hash} ${second}`, 1, 0, 2000) > rate ? '429' : '';
}

// -- malformed inferences over HTTP --------------------------------------------------------------
// Triton before 26.05 answers unreadable JSON with 500, and crashes at sizes too large to allocate and at deeply nested
// JSON. So requests are checked against the KServe protocol here.

const BYTES_OF = {
    BOOL: 1, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2, FP16: 2, BF16: 2, UINT32: 4, INT32: 4, FP32: 4, UINT64: 8, INT64: 8, FP64: 8,
};
const NO_NUMBERS = ['NaN', 'Infinity', 'Inf'];  // Triton accepts them, JSON does not
const LAX = /[[,:\s]-?(?:0\d|\.)|\.\D|[\w.](?:NaN|Inf)|(?:NaN|Infinity|Inf(?!inity))\w/;  // what `parsed` accepts: 01, .5, 1., 1NaN
const MOST_NAMES = 10000;  // in a request; njs takes long for objects with many
const HIGH = /^[dD][89abAB]/, LOW = /^[dD][c-fC-F]/;  // the halves of a surrogate pair, after \u
const PARAMETERS = {
    sequence_start: 'boolean', sequence_end: 'boolean', binary_data_output: 'boolean', priority: 'size', timeout: 'size',
    binary_data: 'boolean', binary_data_size: 'size', classification: 'size', shared_memory_region: 'string',
    shared_memory_byte_size: 'size', shared_memory_offset: 'size',
};

// Content handler of an inference: refuses it, or passes it on unchanged.
function infer(r) {
    const reason = flawOfRequest(r);
    if (reason) {
        r.return(400, `${JSON.stringify({ error: `malformed request: ${reason}` })}\n`);
    } else {
        r.internalRedirect('@triton');
    }
}

function flawOfRequest(r) {
    const file = r.variables.request_body_file;  // set for a large body, which nginx keeps until the request ends
    const body = file ? fs.readFileSync(file) : r.requestBuffer || Buffer.alloc(0), size = body.length;
    const said = r.headersIn['Inference-Header-Content-Length'];
    if (said !== undefined && (!/^\d{1,15}$/.test(said) || Number(said) > size)) {
        return `Inference-Header-Content-Length is ${said.slice(0, 40)}, of a body of ${size} bytes`;
    }
    const length = said === undefined ? size : Number(said);
    if (said !== undefined && length === 0) {
        return r.variables.bulk ? NOT_BULK : '';  // only tensors: Triton knows their shapes from the model
    }
    let document, flaw;
    try {
        const text = length ? body.slice(0, length).toString() : '';  // njs cannot slice an empty buffer
        document = parsed(text);
        flaw = flawOfText(text, document);
    } catch (error) {
        return `invalid JSON: ${error.message}`;
    }
    flaw = flaw || flawOf(document, size - length);
    const sent = document.parameters || {};
    return flaw || (r.variables.bulk && (sent.priority !== BULK || sent.bulk !== true) ? NOT_BULK : '');
}

// Whether the character after it is escaped: an odd number of backslashes.
function endsEscaped(piece) {
    let start = piece.length;
    while (start && piece[start - 1] === '\\') {
        start -= 1;
    }
    return (piece.length - start) % 2 === 1;
}

// What JSON.parse accepts and Triton reads differently: of a duplicate name Triton takes the first value, so the check here
// would see another one than Triton. Some numbers, and half a surrogate pair, it cannot read. The text is split at its quotes:
// a regular expression that matches often looks at the rest of the text each time, which takes minutes for a few MB.
function flawOfText(text, document) {
    const pieces = text.split('"'), outside = [];
    let inside = false;
    pieces.forEach(piece => {
        if (!inside) {
            outside.push(piece);
        }
        inside = !inside || endsEscaped(piece);
    });
    const between = outside.join(' '), names = between.split(':').length - 1;
    if (LAX.test(between)) {
        return 'invalid JSON: a number like 01, .5, 1. or 1NaN';
    }
    if (names > MOST_NAMES || names !== namesIn(document)) {
        return names > MOST_NAMES ? `more than ${MOST_NAMES} names` : 'a name occurs twice';
    }
    return pieces.some(piece => piece.includes('\\u') && hasHalf(piece)) ? 'half a surrogate pair' : '';
}

// Whether a piece of a string has half a surrogate pair.
function hasHalf(piece) {
    let before = '', isOpen = false, found = false;  // isOpen: `before` is a first half
    piece.split('\\u').forEach((each, place) => {
        const isEscape = place > 0 && !endsEscaped(before), isFirst = isEscape && HIGH.test(each);
        found = found || (isEscape && LOW.test(each)) !== isOpen || (isFirst && each.length > 4);
        before = each;
        isOpen = isFirst;
    });
    return found || isOpen;
}

function namesIn(value) {
    const below = isObject(value) ? Object.keys(value).map(name => value[name]) : Array.isArray(value) ? value : [];
    const own = isObject(value) ? below.length : 0;
    return below.reduce((sum, each) => each !== null && typeof each === 'object' ? sum + namesIn(each) : sum, own);
}

function parsed(text) {
    try {
        return JSON.parse(text);
    } catch (error) {
        return JSON.parse(NO_NUMBERS.reduce((changed, each) => changed.split(each).join('0.5'), text));
    }
}

function isObject(value) {
    return value !== null && typeof value === 'object' && !Array.isArray(value);
}

function isSize(value) {
    return typeof value === 'number' && value >= 0 && value <= 9007199254740991 && Math.floor(value) === value;
}

// What is wrong with a request, or ''; `tail` is the number of bytes after the JSON.
function flawOf(document, tail) {
    if (!isObject(document) || !Array.isArray(document.inputs)) {
        return 'it must be an object with a list "inputs"';
    }
    if (document.id !== undefined && typeof document.id !== 'string') {
        return '"id" must be a string';
    }
    const outputs = document.outputs === undefined ? [] : document.outputs;
    if (!Array.isArray(outputs) || !outputs.every(each => isObject(each) && typeof each.name === 'string')) {
        return '"outputs" must be a list of objects with a "name"';
    }
    let flaw = flawOfParameters(document.parameters), left = tail;
    outputs.forEach(each => { flaw = flaw || flawOfParameters(each.parameters); });
    document.inputs.forEach(each => {
        flaw = flaw || flawOfInput(each);
        left -= flaw ? 0 : (each.parameters || {}).binary_data_size || 0;
    });
    return flaw || (left ? `${tail} bytes follow the JSON, the inputs name ${tail - left}` : '');
}

function flawOfParameters(parameters) {
    if (parameters === undefined) {
        return '';
    }
    if (!isObject(parameters)) {
        return '"parameters" must be an object';
    }
    const wrong = Object.keys(parameters).find(name => {
        const value = parameters[name], kind = PARAMETERS[name];
        if (name === 'sequence_id') {
            return !isSize(value) && (typeof value !== 'string' || value.length > 128);
        }
        return kind === 'size' ? !isSize(value) : kind ? typeof value !== kind : value === null || typeof value === 'object';
    });
    return wrong === undefined ? '' : `parameter ${JSON.stringify(wrong.slice(0, 40))} is of a wrong type`;
}

function flawOfInput(input) {
    if (!isObject(input) || typeof input.name !== 'string' || typeof input.datatype !== 'string') {
        return 'an input must be an object with the strings "name" and "datatype"';
    }
    const name = `input ${JSON.stringify(input.name.slice(0, 40))}`;
    if (!Array.isArray(input.shape) || !input.shape.every(isSize)) {
        return `${name}: "shape" must be a list of sizes`;
    }
    const flaw = flawOfParameters(input.parameters), parameters = input.parameters || {};
    if (flaw) {
        return `${name}: ${flaw}`;
    }
    const count = input.shape.reduce((product, each) => product * each, 1), width = BYTES_OF[input.datatype];
    if (width === undefined && input.datatype !== 'BYTES') {  // Triton reads INT64\u0000 as INT64
        return `${name}: "datatype" must be one of BYTES, ${Object.keys(BYTES_OF).join(', ')}`;
    }
    if (parameters.shared_memory_region !== undefined) {
        return '';  // callers cannot register one, and Triton says so
    }
    if (parameters.binary_data_size !== undefined) {
        return width === undefined || count * width === parameters.binary_data_size ? '' : `${name}: ${count} values of \
${input.datatype}, and ${parameters.binary_data_size} bytes`;
    }
    const found = countOf(input.data, allowedIn(input.datatype));
    if (!Array.isArray(input.data) || isNaN(found)) {
        return `${name}: "data" must be a list of values of ${input.datatype.slice(0, 40)}`;
    }
    return found === count ? '' : `${name}: ${count} values by its shape, ${found} in "data"`;
}

// The values of a type. Triton would take the lowest bits of a larger integer, and Infinity for a larger FP32.
function allowedIn(datatype) {
    const integer = /^(U?)INT(8|16|32|64)$/.exec(datatype);
    if (!integer) {
        const most = datatype === 'FP32' ? 3.4028235e38 : Number.MAX_VALUE;
        return { kind: datatype === 'BYTES' ? 'string' : datatype === 'BOOL' ? 'boolean' : 'number', least: -most, most };
    }
    const most = Math.pow(2, integer[1] ? integer[2] : integer[2] - 1) - 1;  // of 64 bits it is rounded up
    return { kind: 'number', whole: true, least: integer[1] ? 0 : -most - 1, most };
}

// How many values a nested list has; NaN if one is not allowed.
function countOf(data, allowed) {
    if (!Array.isArray(data)) {
        const fits = allowed.kind !== 'number' || (allowed.least <= data && data <= allowed.most && (!allowed.whole || Math.floor(data) === data));
        return typeof data === allowed.kind && fits ? 1 : NaN;
    }
    let count = 0;
    for (let place = 0; place < data.length; place++) {
        count += countOf(data[place], allowed);
    }
    return count;
}

// Header filter of gRPC answers. Unreadable bytes are the caller's fault: INVALID_ARGUMENT instead of the library's INTERNAL.
// A model that is being reloaded is not the caller's fault: UNAVAILABLE instead of Triton's NOT_FOUND.
function blame(r) {
    const status = r.headersOut['grpc-status'], message = r.headersOut['grpc-message'] || '';
    if (status === '13' && message.startsWith(`${UNREADABLE} request`)) {
        r.headersOut['grpc-status'] = '3';
    } else if (status === '5' && message.includes(NOT_LOADED)) {
        r.headersOut['grpc-status'] = '14';
        r.headersOut['grpc-retry-pushback-ms'] = '100';
    }
}

// The same for an inference over HTTP, with the reason in the body: callers get Triton's 404 and 500, counted as 503 and 400.
function excused(r, data, flags) {
    if (r.status === 404 && data.toString().includes(NOT_LOADED)) {
        r.variables.counted = '503';
    } else if (r.status === 500 && data.toString().includes(UNREADABLE)) {
        r.variables.counted = '400';
    }
    if (data.length) {
        r.done();  // the reason is in the first part of the answer
    }
    r.sendBuffer(data, flags);
}

// The model in a gRPC message: the first field of a ModelInferRequest or ModelInferResponse, after the five bytes of the frame.
function modelIn(data) {
    const name = data.length > 7 && data[5] === 0x0a ? data.slice(7, 7 + data[6]).toString() : '';
    return NAME.test(name) ? name : '';
}

// Notes which model answered over gRPC.
function answered(r, data, flags) {
    if (data.length > 7) {
        r.variables.answered = r.variables.api === 'infer' ? modelIn(data) : '';
        r.done();  // the rest of the answer passes unread
    }
    r.sendBuffer(data, flags);
}

// The model that the caller asked for, for the log; empty if the gateway refused a gRPC request before it read the body.
function model(r) {
    const path = MODEL.exec(r.variables.request_uri);
    if (path || r.variables.answered || r.variables.api !== 'infer') {
        return path ? path[1] : r.variables.answered;
    }
    return modelIn(r.requestBuffer || Buffer.alloc(0));
}

// Counts a request for `metrics`, once, when it is logged. Only models that answered become labels, so that callers cannot
// invent any. Requests of bulk keys are not timed. Without an answer, only requests that timed out or were given up are
// timed: failures are counted by status, and a caller may send slowly.
function observed(r) {
    const variables = r.variables;
    const grpc = variables.sent_http_grpc_status || variables.upstream_trailer_grpc_status || '';
    const protocol = (variables.content_type || '').startsWith('application/grpc') ? 'grpc' : 'http';
    const path = MODEL.exec(variables.status === '200' ? variables.request_uri : '');
    const model = variables.answered || (path ? path[1] : '');
    const labels = `protocol="${protocol}",api="${variables.api || 'other'}",model="${model}"`;
    const status = grpc || variables.counted || variables.status;
    const counts = ngx.shared.counts;
    try {
        counts.incr(`gateway_requests_total{${labels},status="${status}"}`, 1, 0);
        if (variables.api === 'infer' && !variables.refusal && !variables.bulk && (model || IN_VAIN.test(status))) {
            const seconds = Number(variables.request_time);
            const bound = variables.buckets_s.split(' ').find(each => seconds <= Number(each)) || '+Inf';
            counts.incr(`${DURATION}_bucket{${labels},le="${bound}"}`, 1, 0);
            counts.incr(`${DURATION}_sum{${labels}}`, seconds, 0);
        }
    } catch (error) {
        ngx.log(ngx.WARN, `not counted: ${error.message}`);
    }
    return '';
}

// End of the served certificate (the first in the chain) in seconds since 1970; NaN if it cannot be read.
function certificateEnd(run) {
    let pem = '';
    try {
        pem = fs.readFileSync(`${run}/served.crt`).toString().split('-----')[2] || '';
    } catch (error) {  // the folder was emptied
    }
    const found = VALIDITY.exec(Buffer.from(pem.replace(/\s/g, ''), 'base64').toString('hex'));
    if (!found) {
        return NaN;
    }
    const text = Buffer.from(found[1] || found[2], 'hex').toString();
    const full = found[2] ? text : (text < '50' ? '20' : '19') + text;  // RFC 5280: two digits mean 1950 to 2049
    return Date.parse(full.replace(/(....)(..)(..)(..)(..)(..)/, '$1-$2-$3T$4:$5:$6Z')) / 1000;
}

// Whether gateway.sh could not load a changed certificate, key, limit or address.
function isPending(run) {
    try {
        fs.accessSync(`${run}/pending`);
        return true;
    } catch (error) {
        return false;
    }
}

function numberOf(bound) {
    return bound === '+Inf' ? Infinity : Number(bound);
}

// The metrics page. Stored is the count per bucket; shown, as Prometheus expects, the count up to its bound. Counts survive a
// change of limits.conf: buckets of removed bounds count for the next bound above.
function metrics(r) {
    const counts = {}, fell = {};
    ngx.shared.counts.items(MOST_SERIES).forEach(item => { counts[item[0]] = item[1]; });
    const names = Object.keys(counts).sort();
    let text = '# TYPE gateway_requests_total counter\n';
    names.filter(name => name.startsWith('gateway_requests_total')).forEach(name => {
        text += `${name} ${counts[name]}\n`;
    });
    names.forEach(name => {
        const found = BUCKET.exec(name);
        if (found) {
            fell[found[1]] = (fell[found[1]] || []).concat({ bound: numberOf(found[2]), count: counts[name] });
        }
    });
    text += `# TYPE ${DURATION} histogram\n`;
    const bounds = r.variables.buckets_s.split(' ').concat('+Inf');
    Object.keys(fell).forEach(labels => {
        const upTo = bound => fell[labels].reduce((sum, each) => each.bound <= bound ? sum + each.count : sum, 0);
        bounds.forEach(bound => { text += `${DURATION}_bucket{${labels},le="${bound}"} ${upTo(numberOf(bound))}\n`; });
        text += `${DURATION}_sum{${labels}} ${counts[`${DURATION}_sum{${labels}}`] || 0}\n`;
        text += `${DURATION}_count{${labels}} ${upTo(Infinity)}\n`;
    });
    text += '# TYPE gateway_certificate_expiry_timestamp_seconds gauge\n';
    text += `gateway_certificate_expiry_timestamp_seconds ${certificateEnd(r.variables.run)}\n`;
    text += '# TYPE gateway_reload_pending gauge\n';
    text += `gateway_reload_pending ${isPending(r.variables.run) ? 1 : 0}\n`;
    r.headersOut['Content-Type'] = 'text/plain; version=0.0.4';
    r.return(200, text);
}

export default { refusal, infer, blame, excused, answered, model, observed, metrics };
