// Draws the selected annotation anew with a MONAI Label server that 'monai-vslp label' started. QuPath 0.5 or newer: open this
// file in the script editor, set the four values below, select one annotation (the region), and run it.
// Annotations named "stroke" whose class is one of the model's are corrections: brush, polygon, line or points.
import com.google.gson.JsonArray
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.net.http.HttpClient
import java.net.http.HttpRequest
import java.net.http.HttpResponse
import java.nio.charset.StandardCharsets
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO

def server = 'http://127.0.0.1:8000'
def model = 'run'  // as the server names it: GET /info/
def proportions = [:]  // of the region, in percent, such as [tumour: 60, stroma: '30-35', fat: '<5']; empty: not known
def image = new File(getCurrentServer().getURIs()[0]).getName().replaceFirst(/\.[^.]+$/, '')  // id: the file name without ending

def region = getSelectedObject()
if (region == null || !region.isAnnotation() || region.getName() == 'stroke') {
    throw new IllegalArgumentException('Select one annotation: the region that is to be drawn.')
}
def gson = GsonTools.getInstance()
def json = { object -> JsonParser.parseString(gson.toJson(object)) }  // a feature of GeoJSON, level-0 (x, y)
def params = new JsonObject()
params.add('region', json(region))
def strokes = new JsonArray()
getAnnotationObjects().findAll { it.getName() == 'stroke' && it.getPathClass() != null }.each { strokes.add(json(it)) }
if (strokes.size() > 0) params.add('strokes', strokes)
if (!proportions.isEmpty()) params.add('proportions', JsonParser.parseString(gson.toJson(proportions)))
def body = new JsonObject()
body.add('params', params)

def encode = { text -> URLEncoder.encode(text, StandardCharsets.UTF_8) }
def request = HttpRequest.newBuilder(URI.create("${server}/infer/wsi_v2/${encode(model)}?image=${encode(image)}"))
    .header('Content-Type', 'application/x-www-form-urlencoded')
    .POST(HttpRequest.BodyPublishers.ofString('wsi=' + encode(body.toString())))
    .build()
def answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofByteArray())
if (answer.statusCode() != 200) {
    throw new RuntimeException("The server says ${answer.statusCode()}: " + new String(answer.body(), StandardCharsets.UTF_8))
}
def found = PathIO.readObjectsFromGeoJSON(new ByteArrayInputStream(answer.body()))
removeObjects(region.getChildObjects().findAll { it.getName() != 'stroke' }, false)  // what an earlier answer left
region.addChildObjects(found)
fireHierarchyUpdate()
println "${found.size()} polygons"
